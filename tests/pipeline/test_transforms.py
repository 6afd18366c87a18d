"""Transforms from recipe to artifact: the model stays what it is, until it is rounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qtool.artifact.qtool import Qtool
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import PlanError
from qtool.models import open_artifact
from qtool.pipeline import loop, transform
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.events import silent
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.report.model import Report
from tests.conftest import MIXTURES, TINY

TOKENS = torch.arange(3, 45).view(2, 21)
GEMMA = ("gemma2", "gemma3_text")
EVERYTHING: list[Any] = [
    "rotate",
    "smooth",
    {"permute": {"by": "inputs"}},
    "permute",
    "equalize",
    {"awq": {"steps": 3}},
    {"hadamard": {"block": 16}},
]


def recipe(folder: Path, transforms: list[Any], **fields: Any) -> str:
    told: dict[str, Any] = {
        "recipe": 1,
        "name": "transformed",
        "calibration": {"samples": 3, "length": 48, "min_tokens": 1},
        "transforms": transforms,
        "layers": [{"match": "*", "weights": "int4-g16"}],
        "export": [{"to": "qtool"}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(told | fields))
    return str(path)


def allowed(name: str) -> list[Any]:
    """What a family has places for."""
    if name in GEMMA:
        return [{"rotate": {"edges": ["heads"]}}, *EVERYTHING[1:]]
    return EVERYTHING


def logits(model: Checkpoint) -> Tensor:
    walker = Walker(model, torch.device("cpu"), torch.float32)
    hidden = walker.embed(TOKENS)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return torch.stack([walker.logits(hidden, sample) for sample in range(2)])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [*TINY, *MIXTURES])
def test_every_family_computes_the_same_behind_all_of_them(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(name)
    job = prepare(str(folder), recipe(tmp_path, allowed(name)), device="cpu", dtype="fp32")
    changed, made = transform.transformed(job, tmp_path / "none", None, silent)
    done = [edit.op.name() if edit.op else "fold" for edit in made.edits]
    wanted = {"hadamard", "scale", "permutation"} | (set() if name in GEMMA else {"fold"})
    assert set(done) == wanted
    edges = [e for e in job.checkpoint.family.edges(job.checkpoint.config, 0) if e.kind != "scores"]
    assert done.count("scale") >= 2 * len(edges) - 2
    original = logits(job.original)
    exact = transform.Rewritten(job.original, made.edits, dtype=torch.float32)
    assert apart(logits(exact), original) < 1e-3
    own = 0.02 if "float32" not in str(TINY.get(name, MIXTURES.get(name))) else 1e-3
    assert apart(logits(changed.checkpoint), original) < own  # norms and embeddings in their own type
    quantized = [p for p in changed.plan.layers if p.format and p.module.kind == "linear"]
    assert quantized
    assert all([op.label for op in p.input_ops] == ["hadamard-16"] for p in quantized)


def test_from_recipe_to_artifact(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = tiny_checkpoint("llama-tied"), tmp_path / "out"
    exports = [{"to": "qtool"}, {"to": "compressed-tensors"}]
    text = tmp_path / "text.txt"
    text.write_text("A short text that is long enough to be scored. " * 40)
    asked = {"export": exports, "eval": {"text": str(text), "context": 64, "chunks": 2}, "method": "gptq"}
    asked["layers"] = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "int4-g32"}]
    report = run(QuantizeOptions(str(folder), recipe(tmp_path, EVERYTHING[:-1], **asked), out, dtype="fp32"))
    assert [stage.name for stage in report.stages][:3] == ["plan", "transform", "calibrate"]
    assert report.recipe["transforms"][1]["smooth"]["edges"] == ["norm", "heads", "product"]
    (evaluation,) = report.evaluations
    original = logits(HFCheckpoint(folder))
    found = [open_artifact(out / name) for name in ("qtool", "compressed-tensors")]
    assert all(not model.tied and model.config["tie_word_embeddings"] is False for model in found)
    assert torch.equal(*(model.tensor("lm_head.weight") for model in found))
    assert apart(logits(found[0]), original) < 0.5
    assert evaluation.base_ppl is not None
    plain = run(QuantizeOptions(str(folder), recipe(tmp_path, [], **asked), tmp_path / "plain", dtype="fp32"))
    assert evaluation.base_ppl == plain.evaluations[0].base_ppl  # that of the original model
    assert "transforms" not in plain.recipe
    assert "transform" not in [stage.name for stage in plain.stages]
    assert plain.source_bytes == report.source_bytes
    assert plain.source_fingerprint == report.source_fingerprint


def test_operations_that_stay_are_in_the_artifact(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = tiny_checkpoint("llama"), tmp_path / "out"
    layers = [
        {"match": "lm_head", "keep": True},
        {"match": "*", "weights": "mxfp4", "activations": "mxfp4", "method": "gptq"},
    ]
    exports = [{"to": "qtool"}, {"to": "compressed-tensors"}]
    asked = recipe(tmp_path, ["hadamard"], layers=layers, export=exports)
    report = run(QuantizeOptions(str(folder), asked, out, dtype="fp32"))
    labels = {entry.activations for entry in report.layers if entry.format}
    assert labels == {"mxfp4"}
    found = [open_artifact(out / name) for name in ("qtool", "compressed-tensors")]
    assert found[0].input_ops == found[1].input_ops
    assert {op.label for ops in found[0].input_ops.values() for op in ops} == {"hadamard-32"}
    assert len(found[0].input_ops) == 14
    assert torch.equal(logits(found[0]), logits(found[1]))
    assert apart(logits(found[0]), logits(HFCheckpoint(folder))) < 0.6
    again = tmp_path / "again"
    plain = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "int8-channel"}]
    run(QuantizeOptions(str(out / "qtool"), recipe(tmp_path, [], layers=plain), again, dtype="fp32"))
    assert Qtool().open(again).input_ops == found[0].input_ops
    kept = [{"match": "*.down_proj", "keep": True}, *plain]
    with pytest.raises(PlanError, match="weight is made for inputs behind hadamard-32: only a quantized layer"):
        prepare(str(out / "qtool"), recipe(tmp_path, [], layers=kept))
    with pytest.raises(PlanError, match="has operations on inputs already: nothing can be folded into it"):
        prepare(str(out / "qtool"), recipe(tmp_path, ["smooth"], layers=plain))


def test_an_interrupted_run_goes_on_with_the_same_edits(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = str(tiny_checkpoint("llama")), recipe(tmp_path, ["rotate", "smooth"])
    options = QuantizeOptions(folder, asked, tmp_path / "whole", dtype="fp32")
    run(options)
    expected = bytes_of(tmp_path / "whole")
    plain, calls = loop.solve_unit, []

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(loop, "solve_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(QuantizeOptions(folder, asked, tmp_path / "out", dtype="fp32"))
    monkeypatch.setattr(loop, "solve_unit", plain)
    kept = tmp_path / "out.work" / transform.FILE
    assert kept.is_file()
    with monkeypatch.context() as context:
        context.setattr(transform, "carried_out", None)  # nothing is searched again
        run(QuantizeOptions(folder, asked, tmp_path / "out", dtype="fp32", keep=True))
    assert bytes_of(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out.work" / "manifest.json").read_text())
    assert len(manifest["run"]["transforms"]) == 64
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x7f")  # a damaged list is made again
    report = run(QuantizeOptions(folder, asked, tmp_path / "out", dtype="fp32", overwrite=True))
    assert isinstance(report, Report)
    assert bytes_of(tmp_path / "out") == expected


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("name", "transforms", "message"),
    [
        ("gemma2", ["rotate"], "hidden states of gemma2 models cannot be turned, because norms write them"),
        ("gpt_oss", [{"equalize": {"edges": ["product"]}}], "gpt_oss models have none of the places that it works on"),
        ("llama", [{"hadamard": {"block": 128}}], "hadamard: 64 inputs cannot be cut into runs of 128"),
        ("llama", ["hadamard", "smooth"], "smooth has to come before hadamard, which stays in the model"),
    ],
)
def test_what_cannot_work_is_said_by_the_plan(
    name: str, transforms: list[Any], message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        prepare(str(tiny_checkpoint(name)), recipe(tmp_path, transforms))


def test_an_artifact_that_cannot_be_told_is_refused_before_anything_is_computed(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = recipe(tmp_path, ["hadamard"], export=[{"to": "mlx"}], layers=[{"match": "*", "weights": "int4-g32-asym"}])
    with pytest.raises(PlanError, match="cannot be told to do hadamard-32 to inputs; qtool can"):
        prepare(str(tiny_checkpoint("llama")), asked)


def test_statistics_of_the_model_as_it_was_are_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    asked = recipe(tmp_path, ["smooth"], method={"rtn": {"importance": True}})
    stats = tmp_path / "stats.safetensors"
    calibrate(CalibrateOptions(str(tiny_checkpoint("llama")), asked, stats))
    with pytest.raises(PlanError, match="they are of the model as it was before smooth; run without them"):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), asked, tmp_path / "out", stats=stats))


def test_inputs_are_sorted_and_their_largest_channels_rounded_twice(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama")
    sort = [{"permute": {"by": "inputs", "edges": ["input"]}}]
    apart_by = {}
    for count in (0, 16, 64):
        layers = [
            {"match": "lm_head", "keep": True},
            {"match": "*", "weights": "int8-channel", "activations": {"type": "nvfp4", "augment": count}},
        ]
        out = tmp_path / str(count)
        run(QuantizeOptions(str(folder), recipe(tmp_path, sort, layers=layers), out, dtype="fp32"))
        model = open_artifact(out)
        assert all([op.label for op in ops] == ["permutation"] for ops in model.input_ops.values())
        assert {layer.activations.augmented for layer in model.layers.values() if layer.activations} == {count}
        apart_by[count] = apart(logits(model), logits(HFCheckpoint(folder)))
    assert apart_by[64] < 0.5 * apart_by[16]
    assert apart_by[16] < 0.95 * apart_by[0]
    asked = recipe(tmp_path, sort, layers=layers, export=[{"to": "compressed-tensors"}])
    with pytest.raises(PlanError, match="permutation"):
        run(QuantizeOptions(str(folder), asked, tmp_path / "no"))
