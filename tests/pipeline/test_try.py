"""Candidates of transforms: every block takes what a slow comparison finds best, and the report says what it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qtool import registry
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import CheckpointError, PlanError, RecipeError
from qtool.models import open_artifact
from qtool.pipeline import attempt, transform
from qtool.pipeline.events import Event, silent
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.roughly import Roughly
from qtool.pipeline.tokens import tokens_of
from qtool.recipe.load import load_recipe
from tests.artifact.conftest import save_llama
from tests.recipe.test_json_schema import SCHEMA, accepts

LAYERS = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "int4-g32", "activations": "int4-token"}]
CANDIDATES: list[Any] = ["equalize", {"hadamard": {"block": 64}}, ["equalize", {"hadamard": {"block": 32}}]]


def recipe(folder: Path, transforms: list[Any], **fields: Any) -> str:
    told: dict[str, Any] = {
        "recipe": 1,
        "name": "tried",
        "calibration": {"samples": 4, "length": 40},
        "transforms": transforms,
        "layers": LAYERS,
        "export": [{"to": "qtool"}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(told | fields))
    return str(path)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with outliers in what layers read, others in each block: here folds help, and there matrices."""
    from safetensors.torch import load_file, save_file

    folder = save_llama(tmp_path_factory.mktemp("uneven") / "model", 128, torch.float32, blocks=4)
    tensors = load_file(folder / "model.safetensors")
    for i in (0, 3):
        tensors[f"model.layers.{i}.input_layernorm.weight"][::40] *= 20
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"][::40] *= 20
    for i in (1, 3):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"][::40] *= 20
        tensors[f"model.layers.{i}.mlp.down_proj.weight"][:, ::40] /= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def outputs(model: Checkpoint, i: int, hidden: Tensor) -> Tensor:
    """What block i makes of hidden states."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    states = walker.embed(torch.zeros(hidden.shape[:2], dtype=torch.long))
    states.values.copy_(hidden)
    walker.advance(walker.load_block(i), i, states)
    return states.values.clone()


def slow_errors(folder: Path, tmp_path: Path, candidate: list[Any], judge: Tensor) -> list[float]:
    """The same comparison by whole runs: artifacts of one candidate alone, block by block."""
    original = prepare(str(folder), recipe(tmp_path, [])).original
    out = tmp_path / "alone"
    run(QuantizeOptions(str(folder), recipe(tmp_path, candidate), out, dtype="fp32", overwrite=True))
    model, found = open_artifact(str(out)), []
    walker = Walker(original, torch.device("cpu"), torch.float32)
    hidden = walker.embed(judge).values.clone()
    for i in range(4):
        exact = outputs(original, i, hidden)
        found.append(float((outputs(model, i, hidden) - exact).square().sum() / exact.square().sum()))
        hidden = exact
    return found


def done(made: transform.Made) -> list[set[str]]:
    """Names of operations by block."""
    found = [set[str]() for _ in range(4)]
    for edit in made.edits:
        name = edit.edge or edit.modules[0]
        found[int(name.split("layers.")[1].split(".")[0])].add(edit.op.label if edit.op else "fold")
    return found


def test_every_block_takes_what_whole_runs_find_best(uneven: Path, tmp_path: Path) -> None:
    job = prepare(str(uneven), recipe(tmp_path, [{"try": CANDIDATES}]), device="cpu", dtype="fp32")
    judge = tokens_of(job)[attempt.split(4, 0.25, 0)[1]]
    told: list[Event] = []
    changed, made = transform.transformed(job, tmp_path / "none", None, told.append)
    each = [[], *([c] if not isinstance(c, list) else c for c in CANDIDATES)]
    expected = [slow_errors(uneven, tmp_path, candidate, judge) for candidate in each]
    measured = [event.values for event in told if event.message.startswith("block ")]
    for i, values in enumerate(measured):
        assert list(values.values()) == pytest.approx([errors[i] for errors in expected], rel=1e-3)
    labels: list[set[str]] = [set(), {"scale"}, {"hadamard-64"}, {"scale", "hadamard-32"}]
    best = [min(range(4), key=lambda c: expected[c][i]) for i in range(4)]
    assert done(made) == [labels[c] for c in best]
    assert len(set(best)) > 1
    left = sum(expected[c][i] for i, c in enumerate(best)) / sum(expected[0])
    (note,) = [text for text in changed.plan.warnings if text.startswith("try: of 4 blocks, ")]
    assert f"; {left:.2f} of the error of rounded blocks is left" in note
    assert left < 0.9


def test_the_model_computes_the_same_and_layers_know_their_inputs(uneven: Path, tmp_path: Path) -> None:
    job = prepare(str(uneven), recipe(tmp_path, ["smooth", {"try": CANDIDATES}]), device="cpu", dtype="fp32")
    changed, made = transform.transformed(job, tmp_path / "none", None, silent)
    exact = Rewritten(job.original, made.edits, dtype=torch.float32)
    hidden = Walker(job.original, torch.device("cpu"), torch.float32).embed(tokens_of(job)).values
    for i in range(4):
        expected = outputs(job.original, i, hidden)
        assert float((outputs(exact, i, hidden) - expected).norm() / expected.norm()) < 1e-4
        hidden = expected
    told = {p.module.name: p.input_ops for p in changed.plan.layers if p.input_ops}
    assert told == dict(changed.checkpoint.input_ops)
    assert len(told) in (7, 14, 21, 28)


def test_blocks_that_took_different_matrices_go_through_layouts_that_say_which(uneven: Path, tmp_path: Path) -> None:
    layers = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "mxfp4", "activations": "mxfp4"}]
    exports = [{"to": "qtool"}, {"to": "compressed-tensors"}]
    candidates = [{"hadamard": {"block": 32}}, {"hadamard": {"block": 64}}, {"hadamard": {"block": 128}}]
    asked = recipe(tmp_path, [{"try": candidates}], layers=layers, export=exports)
    run(QuantizeOptions(str(uneven), asked, tmp_path / "out", dtype="fp32"))
    ours, theirs = (open_artifact(str(tmp_path / "out" / name)) for name in ("qtool", "compressed-tensors"))
    assert ours.input_ops == theirs.input_ops
    taken = [tuple(ours.input_ops.get(f"model.layers.{i}.mlp.down_proj", ())) for i in range(4)]
    assert len({ops[0].label if ops else "" for ops in taken}) > 1
    for name in ours.names():
        assert torch.equal(ours.tensor(name), theirs.tensor(name))


def test_nothing_is_kept_where_everything_hurts(uneven: Path, tmp_path: Path) -> None:
    layers = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "int4-channel"}]
    asked = recipe(tmp_path, [{"try": [{"smooth": {"alpha": 1.0, "edges": ["heads"]}}]}], layers=layers)
    job = prepare(str(uneven), asked, device="cpu", dtype="fp32")
    _, made = transform.transformed(job, tmp_path / "none", None, silent)
    once = transform.transformed(
        prepare(str(uneven), recipe(tmp_path, [{"smooth": {"alpha": 1.0, "edges": ["heads"]}}], layers=layers)),
        tmp_path / "none",
        None,
        silent,
    )[1]
    assert len(made.edits) < len(once.edits) == 4


@pytest.mark.parametrize(("layers", "method"), [("nvfp4", "rtn"), ("int8-tensor", "gptq")])
def test_scales_of_all_tokens_and_importances_are_measured(
    layers: str, method: str, uneven: Path, tmp_path: Path
) -> None:
    weights = "int8-channel" if layers == "int8-tensor" else layers
    rules = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": weights, "activations": layers}]
    asked = recipe(tmp_path, [{"try": {"candidates": ["smooth"], "held_out": 0.5}}], layers=rules, method=method)
    report = run(QuantizeOptions(str(uneven), asked, tmp_path / "out", dtype="fp32"))
    (note,) = [text for text in report.warnings if text.startswith("try: ")]
    assert float(note.split("; ")[1].split(" ")[0]) < 1


def test_a_run_that_goes_on_says_the_same_and_tries_nothing_again(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tmp_path, [{"try": CANDIDATES[:1]}])
    first = run(QuantizeOptions(str(uneven), asked, tmp_path / "out", dtype="fp32", keep=True))
    monkeypatch.setattr(transform, "Attempt", None)
    (tmp_path / "out.work").rename(tmp_path / "other.work")
    again = run(QuantizeOptions(str(uneven), asked, tmp_path / "other", dtype="fp32"))
    assert again.warnings == first.warnings
    assert any(text.startswith("try: ") for text in first.warnings)


def test_one_sample_is_none_to_judge_by(uneven: Path, tmp_path: Path) -> None:
    asked = recipe(tmp_path, [{"try": ["equalize"]}], calibration={"samples": 1, "length": 40})
    with pytest.raises(CheckpointError, match="one calibration sample is none to learn from"):
        run(QuantizeOptions(str(uneven), asked, tmp_path / "out"))


def test_both_spellings_are_read_and_written_back(tmp_path: Path) -> None:
    both = ["equalize", {"hadamard": {"block": 16}}]
    short = load_recipe(recipe(tmp_path, [{"try": ["awq", both]}]))
    long = load_recipe(recipe(tmp_path, [{"try": {"candidates": [["awq"], both]}}]))
    assert short.transforms == long.transforms
    spelled = ([both], {"candidates": [both]}, {"candidate": [both]})
    files = [yaml.safe_load(Path(recipe(tmp_path, [{"try": tried}])).read_text()) for tried in spelled]
    assert [accepts(SCHEMA, file) for file in files] == [True, True, False]
    written = json.loads(short.model_dump_json())
    assert load_recipe(written).transforms == short.transforms


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["rotate"], "rotate turns the hidden states of all blocks, but candidates are chosen block by block"),
        ([["hadamard", "smooth"]], "hadamard stays in front of layers: name it last"),
        ([{"try": ["smooth"]}], "candidates that are tried inside of candidates: list them here"),
        (["smoth"], "no transform is called 'smoth'; did you mean 'smooth'"),
    ],
)
def test_what_cannot_be_tried_is_said(candidates: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(tmp_path, [{"try": candidates}]))
    assert registry.load("transforms", "try").shorthand == "candidates"


def test_an_artifact_that_cannot_hold_a_candidate_is_refused_in_the_plan(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    layers = [{"match": "*", "weights": "int4-g32-asym"}]
    asked = recipe(tmp_path, [{"try": ["smooth", "hadamard"]}], export=[{"to": "mlx"}], layers=layers)
    with pytest.raises(PlanError, match="cannot be told to do hadamard-32 to inputs"):
        prepare(str(tiny_checkpoint("llama")), asked)
    wide = recipe(tmp_path, [{"try": [{"hadamard": {"block": 128}}]}])
    with pytest.raises(PlanError, match="hadamard: 64 inputs cannot be cut into runs of 128"):
        prepare(str(tiny_checkpoint("llama")), wide)
    after = recipe(tmp_path, [{"try": ["hadamard"]}, "smooth"])
    with pytest.raises(PlanError, match="smooth has to come before try, which stays in the model"):
        prepare(str(tiny_checkpoint("llama")), after)


def rounded_divergence(folder: Path, tmp_path: Path, candidate: list[Any], judge: Tensor) -> float:
    """Mean KL divergence of a whole run with one candidate, by softmax in float64."""
    original = prepare(str(folder), recipe(tmp_path, [])).original
    out = tmp_path / "alone"
    run(QuantizeOptions(str(folder), recipe(tmp_path, candidate), out, dtype="fp32", overwrite=True))
    both = []
    for model in (original, open_artifact(str(out))):
        walker = Walker(model, torch.device("cpu"), torch.float32)
        hidden = walker.embed(judge)
        for i in range(4):
            walker.advance(walker.load_block(i), i, hidden)
        both.append(torch.stack([walker.logits(hidden, s) for s in range(len(judge))]).double().log_softmax(-1))
    return float((both[0].exp() * (both[0] - both[1])).sum(-1).mean())


def test_one_candidate_for_the_whole_model_is_that_of_least_divergence(uneven: Path, tmp_path: Path) -> None:
    candidates: list[Any] = ["rotate", {"equalize": {}}, {"hadamard": {"block": 64}}]
    attempted = {"try": {"candidates": candidates, "by": "model"}}
    job = prepare(str(uneven), recipe(tmp_path, [attempted]), device="cpu", dtype="fp32")
    judge = tokens_of(job)[attempt.split(4, 0.25, 0)[1]]
    told: list[Event] = []
    changed, made = transform.transformed(job, tmp_path / "none", None, told.append)
    measured = [event.values["nats"] for event in told if event.message.startswith("try ")]
    expected = [rounded_divergence(uneven, tmp_path, c, judge) for c in ([], *([c] for c in candidates))]
    assert measured == pytest.approx(expected, rel=2e-3)
    best = min(range(4), key=expected.__getitem__)
    assert best > 0
    alone = transform.transformed(
        prepare(str(uneven), recipe(tmp_path, [candidates[best - 1]]), dtype="fp32"), tmp_path / "none", None, silent
    )[1]
    assert made.edits == alone.edits
    (note,) = made.notes
    assert f"diverges by {expected[best]:.2g}"[:-1] in note
    assert changed.plan.warnings[-1] == note


def test_an_output_layer_that_may_be_turned_has_a_matrix_of_its_own_whatever_is_taken(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    attempted = {"try": {"candidates": ["rotate"], "by": "model"}}
    rules = [{"match": "role:head", "keep": True}, {"match": "*", "weights": "int8-channel"}]
    asked = recipe(tmp_path, [attempted], layers=rules)
    for seed in range(3):
        options = QuantizeOptions(str(tiny_checkpoint("llama-tied")), asked, tmp_path / f"out{seed}", seed=seed)
        run(options)
        assert not open_artifact(str(tmp_path / f"out{seed}")).tied


def test_what_is_only_tried_is_read_on_another_device_as_well(uneven: Path, tmp_path: Path) -> None:
    """It has no codes that could be decoded there; the device of shapes stands for a GPU."""
    job = prepare(str(uneven), recipe(tmp_path, []), device="cpu", dtype="fp32")
    walker = Walker(Roughly(job, {}, {}), torch.device("meta"), torch.float32)
    found = walker.tensor("model.layers.0.mlp.up_proj.weight")
    assert (found.device.type, found.shape) == ("meta", job.checkpoint.info("model.layers.0.mlp.up_proj.weight").shape)
