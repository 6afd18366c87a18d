"""Transforms that are trained: the model stays what it is, and what training promises is what artifacts give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qtool.calibrate.walker import Walker
from qtool.checkpoint.edits import Edit, digest
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import CheckpointError, RecipeError
from qtool.formats import int as int_format
from qtool.methods._base import split
from qtool.models import open_artifact
from qtool.ops.kronecker import Kronecker
from qtool.ops.scale import Scale
from qtool.pipeline import transform
from qtool.pipeline.events import Event, silent
from qtool.pipeline.learning import BlockRun
from qtool.pipeline.prepare import Job, prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.tokens import tokens_of
from qtool.recipe.load import load_recipe
from qtool.report.model import Report
from qtool.transforms._base import Site
from qtool.transforms._trained import Dominant, Products, near_factors
from tests.artifact.conftest import save_llama

EVERYTHING = {"learned": {"heads": "matrices", "inputs": "whole", "steps": 3}}


def recipe(folder: Path, transforms: list[Any], **fields: Any) -> str:
    told: dict[str, Any] = {
        "recipe": 1,
        "name": "trained",
        "calibration": {"samples": 4, "length": 16},
        "transforms": transforms,
        "method": "rtn",
        "layers": [
            {"match": "lm_head", "keep": True},
            {"match": "*", "weights": "int4-g32", "activations": "int4-token"},
        ],
        "export": [{"to": "qtool"}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(told | fields))
    return str(path)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with outliers in what its layers read."""
    from safetensors.torch import load_file, save_file

    folder = save_llama(tmp_path_factory.mktemp("uneven") / "model", 64, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "blocks" not in name and name.endswith("layernorm.weight"):
            tensors[name][::20] *= 20
        if name.endswith("up_proj.weight"):
            tensors[name][::20] *= 20
        if name.endswith("down_proj.weight"):
            tensors[name][:, ::20] /= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made(folder: Path, told: str, listener: Callable[[Event], None] = silent) -> tuple[Job, transform.Made]:
    job = prepare(str(folder), told, device="cpu", dtype="fp32")
    return transform.transformed(job, folder / "none", None, listener)


def states(model: Any, tokens: Tensor, blocks: int) -> list[Tensor]:
    """Hidden states in front of each block, and behind the last one."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    hidden, found = walker.embed(tokens), []
    for i in range(blocks):
        found.append(hidden.values.clone())
        walker.advance(walker.load_block(i), i, hidden)
    return [*found, hidden.values.clone()]


def through(model: Any, i: int, x: Tensor) -> Tensor:
    """What block i makes of hidden states."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    hidden = walker.embed(torch.zeros(x.shape[:2], dtype=torch.long))
    hidden.values.copy_(x)
    walker.advance(walker.load_block(i), i, hidden)
    return hidden.values.clone()


def test_what_training_measures_is_what_an_artifact_gives(uneven: Path, tmp_path: Path) -> None:
    told = recipe(tmp_path, [{"learned": {"heads": "matrices", "inputs": 16, "steps": 4, "rate": 0.06}}])
    events: list[Event] = []
    job = prepare(str(uneven), told, device="cpu", dtype="fp32")
    run(QuantizeOptions(str(uneven), told, tmp_path / "out", device="cpu", dtype="fp32", verify=False), events.append)
    measured = [event.values for event in events if event.message == "learned"]
    artifact = open_artifact(str(tmp_path / "out"))
    _, unseen = split(4, 0.125, 0)
    exact = states(job.original, tokens_of(job)[unseen], 2)
    for i in range(2):
        output, energy = through(artifact, i, exact[i]), exact[i + 1].square().sum(-1)
        error = ((output - exact[i + 1]).square().sum(-1) / energy).mean()
        assert float(error) == pytest.approx(measured[i]["after"], rel=1e-3)
    assert all(values["after"] < 0.7 * values["before"] for values in measured)
    assert all(ops[0].label == "kronecker-4x4" for ops in artifact.input_ops.values())
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    left = sum(v["after"] for v in measured) / sum(v["before"] for v in measured)
    assert any(text.startswith(f"learned: trained in 2 of 2 blocks; {left:.2f} of the") for text in report.warnings)


def test_the_same_run_learns_the_same(uneven: Path, tmp_path: Path) -> None:
    told = recipe(tmp_path, [{"learned": {"edges": ["heads"], "heads": "matrices", "steps": 1, "rate": 0.03}}])
    (_, one), (_, other) = made(uneven, told), made(uneven, told)
    assert [edit.op.label for edit in one.edits if edit.op] == ["kronecker-16x1"] * len(one.edits)
    assert one.edits
    assert digest(one.edits) == digest(other.edits)


def test_factors_go_on_from_those_of_the_transform_before(uneven: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    _, found = made(
        uneven, recipe(tmp_path, ["smooth", {"learned": {"edges": ["norm"], "steps": 6, "rate": 0.05}}]), events.append
    )
    _, smooth = made(uneven, recipe(tmp_path, ["smooth"]))
    assert found.edits[: len(smooth.edits)] == smooth.edits
    assert len(found.edits) > len(smooth.edits)
    assert all(isinstance(edit.op, Scale) for edit in found.edits)
    measured = [event.values for event in events if event.message == "learned" and event.values]
    assert sum(v["after"] for v in measured) < 0.95 * sum(v["before"] for v in measured)


@pytest.mark.parametrize("name", ["llama-biased", "gemma2", "qwen2_moe"])
def test_every_family_computes_the_same_behind_it(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """While it is trained, and afterwards."""
    folder = tiny_checkpoint(name)
    job = prepare(str(folder), recipe(tmp_path, [EVERYTHING]), device="cpu", dtype="fp32")
    model, generator = Rewritten(job.original, (), dtype=torch.float32), torch.Generator().manual_seed(0)
    walker, tokens, edits = Walker(model, job.device, torch.float32), torch.arange(3, 45).view(2, 21), list[Edit]()
    for edge in model.family.edges(model.config, 0):
        drawn = torch.randn(edge.width, generator=generator) * 0.3
        op: Any = Scale(drawn.exp())
        if edge.kind == "heads":
            heads = Dominant(edge.width // edge.dim, edge.dim, job.device)
            heads.beside.data.normal_(generator=generator)
            op = Kronecker(*(t.detach() for t in heads.op(1).data()[1].values()))
        edits += [Edit(edge.name, op)] if edge.kind in ("norm", "heads", "product") else []
    for reads in dict.fromkeys(m.reads for m in walker.modules[0]):
        modules = tuple(m.name for m in walker.modules[0] if m.reads == reads)
        width = next(m.shape[1] for m in walker.modules[0] if m.reads == reads)
        site = Site("input", width, width, 1, (), None, None, 1)
        edits.append(Edit("", Products(site, width, job.device).op(0), modules))
    hidden = walker.embed(tokens)
    (inputs := hidden.like()).values.copy_(hidden.values)
    block = walker.load_block(0)
    walker.advance(block, 0, hidden)
    plans = {p.module.name: replace(p, format=None, activations=None) for p in job.plan.layers if p.module.block == 0}
    trial = BlockRun(walker, block, 0, inputs, hidden, plans)
    assert trial.held_out(edits, torch.arange(2)) < 1e-9
    assert trial.held_out((), torch.arange(2)) < 1e-12
    exact = Rewritten(job.original, [], dtype=torch.float64)
    other = Rewritten(job.original, edits, dtype=torch.float64)
    x = states(exact, tokens, 1)[0]
    torch.testing.assert_close(through(other, 0, x), through(exact, 0, x), rtol=1e-4, atol=1e-4)


def test_searches_are_compared_with_other_choices_where_a_state_is_judged_and_not_step_by_step(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, right = list[Tensor](), int_format.better_of

    def counted(fmt: Any, w: Tensor, *rest: Any) -> Any:
        compared.append(w)
        return right(fmt, w, *rest)

    monkeypatch.setattr(int_format, "better_of", counted)
    made(uneven, recipe(tmp_path, [{"learned": {"steps": 24}}]))
    assert len(compared) == 2 * 7 * 10  # matrices of two blocks, before training, at its eight checks and behind it


def test_nothing_is_done_where_training_makes_it_worse(uneven: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    fine = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "int8-g32"}]
    wild = {"learned": {"edges": ["norm"], "steps": 2, "rate": 1.0}}
    _, found = made(uneven, recipe(tmp_path, [wild], layers=fine), events.append)
    measured = [event.values for event in events if event.values]
    assert all(values["after"] <= values["before"] for values in measured)
    assert len(found.edits) <= 4


def test_it_is_a_candidate_like_any_other(uneven: Path, tmp_path: Path) -> None:
    several = [{"try": ["equalize", {"learned": {"edges": [], "inputs": 32, "steps": 1}}]}]
    job, found = made(uneven, recipe(tmp_path, several))
    assert any("learned steps=1 edges=[] inputs=32 in" in note for note in found.notes)
    assert any(edit.op and edit.op.label == "kronecker-8x4" for edit in found.edits)
    assert any(p.input_ops for p in job.plan.layers)


def test_heads_matrices_are_dominated_by_their_diagonals_whatever_is_learned() -> None:
    heads = Dominant(3, 8, torch.device("cpu"))
    heads.beside.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(100)
    heads.logarithms.data.normal_(generator=torch.Generator().manual_seed(1))
    for progress in (0.0, 0.3, 1.0):
        matrices = heads.op(progress).left.detach()
        for matrix in matrices:
            for i, row in enumerate(matrix):
                beside = sum(abs(float(x)) for j, x in enumerate(row) if j != i)
                assert beside < 0.901 * abs(float(row[i]))
                assert all((float(x) != 0) == (abs(i - j) <= progress * 7) for j, x in enumerate(row))


def test_matrices_of_inputs_begin_orthogonal() -> None:
    for width, length in ((96, 96), (96, 32), (22, 22)):
        site = Site("input", width, width, 1, (), None, None, 5)
        op = Products(site, length, torch.device("cpu")).op(0)
        assert op.run == length
        whole = op.apply(torch.eye(width)).detach()
        torch.testing.assert_close(whole @ whole.T, torch.eye(width), rtol=0, atol=1e-5)
    assert [near_factors(n) for n in (576, 1536, 32, 7)] == [(24, 24), (48, 32), (8, 4), (7, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": ["stream"]}, "'norm', 'heads' or 'product'"),
        ({"edges": []}, "nothing to train: name edges, or inputs"),
        ({"inputs": 1}, "runs have at least two channels"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(tmp_path, [{"learned": options}]))


def test_one_sample_is_too_few(uneven: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="one to judge by"):
        made(uneven, recipe(tmp_path, ["learned"], calibration={"samples": 1, "length": 32}))
