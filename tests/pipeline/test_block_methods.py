"""Methods that solve blocks, with the one that docs/extending.md shows: what they are given, and what is made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from qtool import registry
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import NumericsError
from qtool.methods._base import Solution
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.load import load_recipe
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.low_rank import LowRank
from tests.test_extending import extra, installed  # noqa: F401

RECIPE = """
recipe: 1
name: blocks
calibration: {samples: 6, length: 48, propagate: PROPAGATE}
layers:
  - {match: lm_head, keep: true}
  - {match: "*.down_proj", weights: int4-g32, method: rtn}
  - {match: "*.o_proj", weights: int3-g32, method: gptq}
  - {match: "*", weights: int3-g32, method: METHOD, activations: int8-token}
export: [{to: qtool}]
"""
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path, extra, installed):  # noqa: F811
    """Writes a recipe; the page's package is installed."""
    installed(extra)

    def write(method="{nudge: {steps: 16}}", propagate="quantized"):
        path = tmp_path / "blocks.yaml"
        path.write_text(RECIPE.replace("METHOD", method).replace("PROPAGATE", propagate))
        return str(path)

    return write


@pytest.fixture
def tasks(recipe, monkeypatch):
    """Every task that the method gets, with copies of its hidden states and of what a run with found weights gives."""
    seen, kind = [], registry.load("methods", "nudge")
    original = kind.solve_block

    def spy(self, task):
        states = [s.values.clone() for s in (task.inputs, task.original, task.targets)]
        with torch.no_grad():
            output = task.run(slice(None), {name: s.quantized.decode() for name, s in task.found.items()})
        seen.append((task, states, output))
        return original(self, task)

    monkeypatch.setattr(kind, "solve_block", spy)
    monkeypatch.setattr(kind, "reads_original", True)
    return seen


def walk(source, tokens, quantized=None):
    """Hidden states in front of each block, and behind the last: of a model, or with another's matrices and inputs."""
    walker, states = Walker(open_checkpoint(str(source)), CPU, torch.float32), []
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        states.append(hidden.values.clone())
        block = walker.load_block(i)
        for module in walker.modules[i] if quantized else ():
            walker.set_weight(block, module, quantized.tensor(f"{module.name}.weight"))
        walker.advance(block, i, hidden, quantized.layers if quantized else {})
    return [*states, hidden.values]


@pytest.mark.parametrize("name", ["llama-biased", "qwen3_moe"])
@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_a_block_is_solved_in_place_and_hidden_states_go_on_behind_it(
    name, propagate, recipe, tasks, tiny_checkpoint, tmp_path
):
    start = "rtn" if propagate == "float" else "{rtn: {importance: true}}"
    source, path = tiny_checkpoint(name), recipe(f"{{nudge: {{steps: 16, start: {start}}}}}", propagate)
    overrides = ("calibration.min_tokens=1",)
    report = run(QuantizeOptions(str(source), path, tmp_path / "out", overrides, device="cpu", dtype="fp32"))
    result = open_artifact(str(tmp_path / "out"))
    tokens = load_tokens(load_recipe(path, overrides).calibration, open_checkpoint(str(source)))
    plain = walk(source, tokens)
    behind = walk(source, tokens, result) if propagate == "quantized" else plain
    assert len(tasks) == 2
    for i, (task, (inputs, original, targets), output) in enumerate(tasks):
        assert task.block == i
        size = float(plain[i + 1].std())
        for found, wanted in ((inputs, behind[i]), (original, plain[i]), (targets, plain[i + 1])):
            assert_close(found, wanted, rtol=0, atol=1e-4 * size)
        before = (output - targets).square().mean()
        matrices = {n: result.tensor(f"{n}.weight") for n in task.weights}
        with torch.no_grad():
            after = (task.forward(inputs, matrices, {}) - targets).square().mean()
        assert 0 < after < 0.95 * before
        if propagate == "quantized":
            assert_close(after, (behind[i + 1] - targets).square().mean(), rtol=1e-3, atol=0)
    owned = {e.name for e in report.layers if e.method == "nudge"}
    assert owned == {n for task, *_ in tasks for n in task.weights}
    assert {e.role for e in report.layers if e.method == "nudge"} >= {"q", "k", "v", "gate", "up"}
    assert {e.method for e in report.layers if e.role == "down"} == {"rtn"}
    for entry in (e for e in report.layers if e.name in owned):
        w, w_hat = (m.tensor(f"{entry.name}.weight").float() for m in (open_checkpoint(str(source)), result))
        wanted = 10 * torch.log10(w.square().sum() / (w - w_hat).square().sum())
        assert entry.weight_error_db == pytest.approx(float(wanted), abs=1e-3)
        assert (entry.tokens > 0) == (propagate == "quantized")


def test_statistics_and_found_matrices_are_those_of_the_steps(recipe, tasks, tiny_checkpoint, tmp_path):
    source = str(tiny_checkpoint("llama-biased"))
    run(QuantizeOptions(source, recipe("{nudge: {steps: 0}}"), tmp_path / "out", device="cpu", dtype="fp32"))
    run(QuantizeOptions(source, recipe("gptq"), tmp_path / "plain", device="cpu", dtype="fp32"))
    stepped, kept = (open_artifact(str(tmp_path / place)) for place in ("plain", "out"))
    for task, (inputs, *_), output in tasks:
        for name, solution in task.found.items():
            wanted = stepped.tensor(f"{name}.weight")
            assert torch.equal(solution.quantized.decode(), wanted) or task.block > 0
            assert torch.equal(kept.tensor(f"{name}.weight"), solution.quantized.decode())
            assert task.stats[name].tokens == 6 * 48
        weights = {name: s.quantized.decode() for name, s in task.found.items()}
        with torch.no_grad():
            assert torch.equal(task.forward(inputs, weights, {}), output)
            some = task.forward(inputs[[4, 1]], weights, {})
        assert_close(some, output[[4, 1]], rtol=1e-4, atol=1e-4)
        learn, judge = task.split(0.25)
        assert sorted([*learn.tolist(), *judge.tolist()]) == list(range(6)) and len(judge) == 2
        assert torch.equal(learn, tasks[0][0].split(0.25)[0])


def test_an_interrupted_run_goes_on_to_the_same_bytes(recipe, tiny_checkpoint, tmp_path, monkeypatch):
    options = {"model": str(tiny_checkpoint("llama-tied")), "recipe": recipe(), "device": "cpu", "dtype": "fp32"}
    run(QuantizeOptions(**options, out=tmp_path / "whole"))
    kind = registry.load("methods", "nudge")
    original = kind.solve_block

    def interrupted(self, task):
        if task.block == 1:
            raise KeyboardInterrupt
        return original(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "solve_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(QuantizeOptions(**options, out=tmp_path / "out"))
    run(QuantizeOptions(**options, out=tmp_path / "out"))
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_result_that_is_not_finite_is_refused(recipe, tiny_checkpoint, tmp_path, monkeypatch):
    def broken(self, task):
        name, solution = next(iter(task.found.items()))
        solution.quantized.params["scale"][:] = torch.inf
        return {name: Solution(solution.quantized)}

    path = recipe()
    monkeypatch.setattr(registry.load("methods", "nudge"), "solve_block", broken)
    with pytest.raises(NumericsError, match=r"nudge made model\.layers\.0\..* infinite or NaN in int3-g32"):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), path, tmp_path / "out", device="cpu", dtype="fp32"))


@pytest.mark.parametrize("own", [False, True])
def test_corrections_run_beside_codes_and_stay_unless_the_method_finds_its_own(
    own, recipe, tasks, tiny_checkpoint, tmp_path, monkeypatch
):
    asked = "{low_rank: {rank: 4, dtype: fp32, whiten: false}}, {sparse: {share: 0.02}}"
    method = "{nudge: {steps: 16, start: {rtn: {importance: true}}}}"
    text = Path(recipe(f"{method}, residuals: [{asked}]")).read_text()
    (tmp_path / "corrected.yaml").write_text(text)
    kind = registry.load("methods", "nudge")
    spied = kind.solve_block

    def doubled(self, task):
        found = spied(self, task)
        for name, s in task.found.items():
            left, rest = s.residuals
            twice = replace(left, tensors={**left.tensors, "left": 2 * left.tensors["left"]})
            found[name] = Solution(s.quantized, residuals=(twice, rest))
        return found

    if own:
        monkeypatch.setattr(kind, "solve_block", doubled)
    options = QuantizeOptions(str(tiny_checkpoint("llama")), str(tmp_path / "corrected.yaml"), tmp_path / "out")
    report = run(replace(options, device="cpu", dtype="fp32"))
    result = open_artifact(str(tmp_path / "out"))
    for kept, (inputs, _, targets), output in tasks:
        task = replace(kept, inputs=inputs)  # as they were in front of the block
        alone = {n: s.quantized.decode() for n, s in task.found.items()}
        whole = {n: Matrix(s.quantized, s.residuals).decode() for n, s in task.found.items()}
        assert all(len(s.residuals) == 2 for s in task.found.values())
        with torch.no_grad():
            assert torch.equal(task.forward(inputs, whole, {n: s.residuals for n, s in task.found.items()}), output)
            assert torch.equal(task.run(slice(None), alone, dict.fromkeys(alone, ())), task.forward(inputs, alone, {}))
            after = task.forward(inputs, {n: result.tensor(f"{n}.weight") for n in whole}, {})
        assert own or float((after - targets).square().mean()) < 0.98 * float((output - targets).square().mean())
        leaf = {n: w.clone().requires_grad_() for n, w in alone.items()}
        slopes = torch.autograd.grad(task.run(slice(None), leaf).float().square().mean(), list(leaf.values()))
        assert all(bool(slope.abs().max() > 0) for slope in slopes)
        for name, s in task.found.items():
            stored = result.matrix(name)
            for correction, before in zip(stored.residuals, s.residuals, strict=True):
                for part, tensor in correction.tensors.items():
                    assert torch.equal(tensor, before.tensors[part] * (2 if own and part == "left" else 1))
            entry = next(e for e in report.layers if e.name == name)
            w = open_checkpoint(str(tiny_checkpoint("llama"))).tensor(f"{name}.weight").float()
            wanted = 10 * torch.log10(w.square().sum() / (w - stored.decode()).square().sum())
            assert entry.weight_error_db == pytest.approx(float(wanted), abs=1e-3)


def test_corrections_of_other_kinds_than_the_recipe_s_are_refused(recipe, tiny_checkpoint, tmp_path, monkeypatch):
    def broken(self, task):
        name, solution = next(iter(task.found.items()))
        more = Correction(LowRank(rank=1), {"left": torch.zeros(1, 1), "right": torch.zeros(1, 1)})
        return {name: Solution(solution.quantized, residuals=(more,))}

    path = recipe()
    monkeypatch.setattr(registry.load("methods", "nudge"), "solve_block", broken)
    with pytest.raises(NumericsError, match=r"nudge: corrections of model\.layers\.0\..*: wanted none, found low_rank"):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), path, tmp_path / "out", device="cpu", dtype="fp32"))
