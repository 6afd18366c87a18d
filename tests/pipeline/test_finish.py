"""Stages behind the block loop: what they replace arrives everywhere, is stored, and is taken over."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool import registry
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, NumericsError, PlanError, RecipeError
from qtool.models import open_artifact
from qtool.pipeline import finish
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.json_schema import json_schema
from qtool.recipe.load import load_recipe
from qtool.report.render import read_report
from qtool.store import overlay
from qtool.store.overlay import Overlaid, read_overlay, write_overlay
from tests.test_extending import install, installed  # noqa: F401 (a fixture)

STAGES = '''
"""Stages that leave simple traces."""
import torch
from qtool.stages._base import Stage, StageResult

RUNS = []

class Louder(Stage):
    """Multiplies scales of down and the last norm."""
    factor: float = 2.0

    @property
    def needs_tokens(self):
        return False

    def misfit(self, plan):
        rounded = {p.module.role for p in plan.layers if p.format}
        return None if "down" in rounded else "it moves scales of down: let a rule quantize it"

    def run(self, task):
        RUNS.append(self.factor)
        task.progress(1, 1, "louder")
        name = "model.layers.1.mlp.down_proj"
        found = task.model.matrix(name).quantized
        norm = task.model.tensor("model.norm.weight")
        about = {"was": float(norm.float().mean()), "word": "loud"}
        return StageResult({name: {"d": found.params["d"] * self.factor}}, {"model.norm.weight": norm * 2}, about)

class Careless(Stage):
    """Gives what does not fit."""
    how: str

    @property
    def needs_tokens(self):
        return False

    def run(self, task):
        norm = task.model.tensor("model.norm.weight")
        q = "model.layers.0.self_attn.q_proj"
        return {
            "shape": StageResult(tensors={"model.norm.weight": norm[:-1]}),
            "type": StageResult(tensors={"model.norm.weight": norm.double()}),
            "nan": StageResult(tensors={"model.norm.weight": norm * float("nan")}),
            "name": StageResult(tensors={"model.nrom.weight": norm}),
            "codes": StageResult(tensors={q + ".weight": task.model.tensor(q + ".weight")}),
            "module": StageResult({"model.norm": {"scale": norm}}),
            "parameter": StageResult({q: {"zoom": norm}}),
            "inf": StageResult({q: {k: v / 0 for k, v in task.model.matrix(q).quantized.params.items()}}),
            "split": StageResult({q: {"tensor": 2 * task.model.matrix(q).quantized.params.get("tensor", norm)}}),
        }[self.how]

class Counting(Stage):
    """Says how many tokens it saw."""
    def run(self, task):
        RUNS.append(task.tokens.shape)
        assert task.seed == 5
        return StageResult(about={"tokens": float(task.tokens.numel())})
'''
POINTS = "[qtool.stages]\n" + "".join(f"{n.lower()} = careless:{n}\n" for n in ("Louder", "Careless", "Counting"))
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def stages(tmp_path, installed):  # noqa: F811
    """Installs the stages of this module; their runs are listed."""
    installed(install(tmp_path / "site", "careless", {"careless.py": STAGES}, POINTS))
    return sys.modules[registry.load("stages", "louder").__module__].RUNS


def recipe(folder, finish, **fields):
    told = {"recipe": 1, "name": "finished", "finish": finish, "export": [{"to": "qtool"}]}
    told |= {"layers": [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "q8_0"}], **fields}
    path = folder / "recipe.json"
    path.write_text(json.dumps(told))
    return str(path)


def options(source, folder, finish, out="out", **fields):
    settings = {key: fields.pop(key) for key in ("keep", "overwrite", "limit") if key in fields}
    return QuantizeOptions(str(source), recipe(folder, finish, **fields), folder / out, dtype="fp32", **settings)


def test_what_a_stage_replaces_goes_through_to_evaluation_and_artifacts(tiny_checkpoint, tmp_path, stages):
    source, text = tiny_checkpoint("llama"), tmp_path / "text.txt"
    text.write_text("A short text that is long enough to be scored. " * 40)
    asked = {"export": [{"to": "qtool"}, {"to": "gguf"}], "eval": {"text": str(text), "context": 64, "chunks": 2}}
    events = []
    report = run(options(source, tmp_path, ["louder", {"louder": {"factor": 0.25}}], **asked), events.append)
    plain = run(options(source, tmp_path, [], "plain", **asked))
    assert stages == [2.0, 0.25]
    assert all(artifact.verified for artifact in report.artifacts)
    original = HFCheckpoint(source)
    for name in ("qtool", "gguf"):
        found, before = (open_artifact(str(tmp_path / out / name)) for out in ("out", "plain"))
        assert torch.equal(found.tensor(NORM).float(), 4 * original.tensor(NORM).float())
        assert torch.equal(found.tensor(f"{DOWN}.weight"), before.tensor(f"{DOWN}.weight") / 2)
        assert torch.equal(found.matrix(DOWN).quantized.codes, before.matrix(DOWN).quantized.codes)
    assert [(e.name, e.changed, e.about["word"]) for e in report.finish] == [("louder", 2, "loud")] * 2
    assert report.finish[1].about["was"] == 2 * report.finish[0].about["was"]
    assert report.evaluations[0].kld_mean > 3 * plain.evaluations[0].kld_mean
    assert [s.name for s in report.stages if "finish" in s.name] == ["finish louder"] * 2
    assert any(e.stage == "finish louder" and "word loud" in e.message for e in events)
    assert "louder" in (tmp_path / "out" / "report.html").read_text()
    assert report.recipe["finish"] == [{"louder": {"factor": 2.0}}, {"louder": {"factor": 0.25}}]
    assert "finish" not in plain.recipe
    assert read_report(tmp_path / "out" / "report.json") == report


def test_an_interrupted_run_takes_over_what_stages_found(tiny_checkpoint, tmp_path, stages, monkeypatch, tree):
    source, finishing = tiny_checkpoint("llama"), ["louder", "counting", {"louder": {"factor": 0.25}}]
    calibration = {"calibration": {"samples": 3, "length": 32, "seed": 5}}
    asked = options(source, tmp_path, finishing, **calibration)
    run(asked)
    assert stages == [2.0, (3, 32), 0.25]
    wanted = {
        name: data for name, data in tree(tmp_path / "out").items() if "report" not in name and "SUMS" not in name
    }
    for interrupted in range(4):
        shutil.rmtree(tmp_path / "out")
        stages.clear()
        left = iter(range(interrupted))

        def dies(*arguments, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write_overlay(*arguments)

        monkeypatch.setattr(finish, "write_overlay", dies)
        if interrupted < 3:
            with pytest.raises(KeyboardInterrupt):
                run(asked)
        monkeypatch.setattr(finish, "write_overlay", write_overlay)
        run(asked)
        found = [2.0, (3, 32), 0.25]
        assert stages == [*found[: interrupted + 1], *found[interrupted:]] if interrupted < 3 else found
        tree_now = tree(tmp_path / "out")
        assert {name: tree_now[name] for name in wanted} == wanted


def test_blocks_are_kept_when_only_stages_change_and_results_when_they_do_not(tiny_checkpoint, tmp_path, stages):
    source, events = tiny_checkpoint("llama"), []
    run(
        options(
            source, tmp_path, ["louder", "counting"], keep=True, calibration={"samples": 3, "length": 32, "seed": 5}
        )
    )
    stages.clear()
    changed = options(
        source, tmp_path, ["louder", {"louder": {"factor": 4.0}}], keep=True, overwrite=True,
        calibration={"samples": 3, "length": 32, "seed": 5},
    )  # fmt: skip
    report = run(changed, events.append)
    assert stages == [4.0]
    assert any("finished earlier" in e.message for e in events)
    assert [e.name for e in report.finish] == ["louder", "louder"]
    path = tmp_path / "out.work" / "finish-0-louder.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    stages.clear()
    events.clear()
    run(changed, events.append)
    assert stages == [2.0]
    assert any(e.warning and "finish-0-louder.safetensors is made again" in e.message for e in events)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("shape", CheckpointError, r"finish careless: model\.norm\.weight: wanted .*64.* found .*63"),
        ("type", CheckpointError, r"model\.norm\.weight: wanted .*bfloat16.* found .*float64"),
        ("nan", NumericsError, r"model\.norm\.weight is not finite"),
        ("name", CheckpointError, r"model\.nrom\.weight: wanted a tensor that is not quantized"),
        ("codes", CheckpointError, r"q_proj\.weight: wanted a tensor that is not quantized"),
        ("module", CheckpointError, r"model\.norm: wanted a quantized matrix"),
        ("parameter", CheckpointError, r"parameter of model\.layers\.0\.self_attn\.q_proj: wanted d, found zoom"),
        ("inf", NumericsError, r"q_proj\.weight is not finite"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(how, error, message, tiny_checkpoint, tmp_path, stages):
    with pytest.raises(error, match=message):
        run(options(tiny_checkpoint("llama"), tmp_path, [{"careless": {"how": how}}]))
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.work").glob("finish*"))


def test_one_scale_of_merged_matrices_stays_one(tiny_checkpoint, tmp_path, stages):
    layers = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "nvfp4"}]
    with pytest.raises(
        CheckpointError, match=r"careless: tensor: wanted one value for all of model\.layers\.0\.qkv, as"
    ):
        run(options(tiny_checkpoint("llama"), tmp_path, [{"careless": {"how": "split"}}], layers=layers))


def test_mistakes_are_told_before_weights_are_read(tiny_checkpoint, tmp_path, stages):
    layers = [{"match": "*.q_proj", "weights": "q8_0"}, {"match": "*", "keep": True}]
    with pytest.raises(PlanError, match="finish: louder: it moves scales of down"):
        prepare(str(tiny_checkpoint("llama")), recipe(tmp_path, ["louder"], layers=layers))
    with pytest.raises(
        RecipeError, match=r"recipe\.json:1: finish\[0\]: no stage is called 'loudr'; did you mean 'louder'"
    ):
        load_recipe(recipe(tmp_path, ["loudr"]))
    with pytest.raises(RecipeError, match=r"finish\[0\]\.louder\.factor: wanted a number, found 'x'"):
        load_recipe(recipe(tmp_path, [{"louder": {"factor": "x"}}]))
    known = json_schema()["$defs"]["Spec"]["anyOf"]
    assert known[0]["enum"] == sorted([*registry.names("stages")])
    assert any(e.get("properties", {}).get("louder", {}).get("properties", {}).get("factor") for e in known[1:])
    assert load_recipe(recipe(tmp_path, ["counting"])).model_dump(mode="json")["finish"] == [{"counting": {}}]


def test_a_file_of_replaced_numbers_is_what_was_written(tiny_checkpoint, tmp_path):
    path = tmp_path / "x.safetensors"
    params, tensors = {"a.b": {"scale": torch.tensor([1.5, 2.0])}}, {"n.weight": torch.tensor([3.0]).bfloat16()}
    write_overlay(path, params, tensors, {"loss": 0.25, "why": "so"}, "run-1", [(0, None, 0.5), (1, 0.3, 0.25)])
    assert set(load_file(path)) == {"a.b.weight.scale", "n.weight"}
    found = read_overlay(path, "run-1")
    assert torch.equal(found[0]["a.b"]["scale"], params["a.b"]["scale"])
    assert torch.equal(found[1]["n.weight"], tensors["n.weight"])
    assert found[2:] == ({"loss": 0.25, "why": "so"}, [[0, None, 0.5], [1, 0.3, 0.25]])
    assert read_overlay(path, "run-2") is None
    assert read_overlay(tmp_path / "none", "run-1") is None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for changed in (
        {**metadata, "content": metadata["content"].replace("0.25", "0.26")},
        {"content": metadata["content"]},
    ):
        save_file(load_file(path), path, changed)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_overlay(path, "run-1")
    header = json.dumps(json.loads(metadata["content"])[:2])  # as it was before there was a course
    save_file(content := load_file(path), path, {"content": header, "seal": overlay._digest(content, header)})
    assert read_overlay(path, "run-1") is None


def test_an_overlaid_model_reads_like_one_of_its_own(tiny_checkpoint, tmp_path, stages):
    run(options(tiny_checkpoint("llama"), tmp_path, []))
    model = open_artifact(str(tmp_path / "out"))
    scale = model.matrix(DOWN).quantized.params["d"]
    found = Overlaid(model, {DOWN: {"d": scale / 2}}, {NORM: model.tensor(NORM) * 2}, "test")
    assert found.fingerprint() != model.fingerprint()
    assert torch.equal(found.rows(f"{DOWN}.weight", 3, 9), model.tensor(f"{DOWN}.weight")[3:9] / 2)
    assert torch.equal(found.rows(NORM, 3, 9), model.tensor(NORM)[3:9] * 2)
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found.rows(other, 3, 9), model.tensor(other)[3:9])
    walkers = [Walker(m, torch.device("cpu"), torch.float32) for m in (model, found)]
    weights = [dict(walker.load_block(1).named_parameters())["mlp.down_proj.weight"] for walker in walkers]
    assert torch.equal(weights[0], 2 * weights[1])
