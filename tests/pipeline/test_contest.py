"""Plans that are measured beside the one that costs say is best, and close contests, which methods decide."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qtool.allocate.fit import fit
from qtool.allocate.knapsack import Group
from qtool.models import open_artifact
from qtool.pipeline import allocator, contest, trial
from qtool.pipeline.allocator import Contest
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.swaps import swapped
from qtool.pipeline.trial import Divergence

BODY = """
recipe: 1
name: fit
calibration: {data: builtin, samples: 8, length: 64}
method: gptq
layers:
  - {match: "role:embedding", keep: true}
  - {match: "*", weights: q8_0}
budget: {formats: [q4_0, q5_0, q8_0], samples: 3, held_out: 4, swaps: 0}
export: [{to: gguf}]
"""


class Known:
    """Decisions of two roles, whose costs are what is said, except that those of "b" are `wrong` times as large."""

    def __init__(self, wrong: float, swaps: int = 4, scales: tuple[float, ...] = (1.2, 1.3, 1.0, 1.1)) -> None:
        self.budget, self.tried, self.wrong, self.measured = SimpleNamespace(swaps=swaps), set(), wrong, 0
        names = ["a", "a", "b", "b"]
        self.open = [SimpleNamespace(options=((SimpleNamespace(module=SimpleNamespace(role=r)),),)) for r in names]
        self.groups = [Group(np.array([1, 2, 4]), np.array([9.0, 4.0, 1.0]) * s) for s in scales]

    def size(self, chosen):
        return sum(int(g.sizes[j]) for g, j in zip(self.groups, chosen, strict=True))

    def solved(self, groups, limit):
        return fit(groups, limit, self.size)

    def measure(self, chosen):
        self.tried.add(chosen)
        factors = (1, 1, self.wrong, self.wrong)
        mean = sum(f * g.costs[j] for f, g, j in zip(factors, self.groups, chosen, strict=True))
        return Divergence((mean * 0.99, mean * 1.01, mean))


@pytest.mark.parametrize(
    ("wrong", "scales", "better"),
    [(1.0, (1.2, 1.3, 1.0, 1.1), False), (2.5, (1.2, 1.3, 1.0, 1.1), True), (0.4, (1.0, 1.1, 1.2, 1.3), True)],
)
def test_wrong_costs_of_a_role_are_found_by_measuring(wrong, scales, better):
    known = Known(wrong, scales=scales)
    first = fit(known.groups, 10, known.size)
    known.measure(first)
    found = swapped(known, first, 10)
    true = [Group(g.sizes, g.costs * f) for g, f in zip(known.groups, (1, 1, wrong, wrong), strict=True)]
    assert known.size(found) <= 10
    assert (found == fit(true, 10, known.size)) and (found != first) == better
    assert len(known.tried) <= 5
    assert swapped(Known(wrong, 0, scales), first, 10) == first


def test_noise_is_no_reason_to_swap(monkeypatch):
    """Another plan has to be better by more than the standard error of the difference."""
    known = Known(2.5)
    first = fit(known.groups, 10, known.size)
    means = {first: (1.0, 3.0, 2.0)}
    monkeypatch.setattr(known, "measure", lambda chosen: Divergence(means.get(chosen, (3.0, 0.5, 2.4))))
    assert swapped(known, first, 10) == first


def test_what_is_close():
    low, high = Divergence((0.1, 0.1)), Divergence((0.12, 0.12))
    assert Contest((0,), low, "other", (1,), high).close
    assert Contest((0,), high, "other", (1,), low).close
    assert not Contest((0,), low, "other", (0,), low).close
    assert not Contest((0,), low).close
    assert not Contest((0,), low, "other", (1,), Divergence((0.126, 0.126))).close
    assert not Contest((0,), low, "other", (1,), high, carried_out=True).close
    assert (Contest((0,), high, "other", (1,), low).taken, Contest((0,), low, "other", (1,), high).taken) == (
        (1,),
        (0,),
    )


@pytest.fixture
def options(tiny_checkpoint, tmp_path, monkeypatch):
    """A run whose plan and best uniform one are close, whatever they are."""
    monkeypatch.setattr(allocator, "CLEAR", 0.0)
    (tmp_path / "fit.yaml").write_text(BODY)
    folder = str(tiny_checkpoint("llama"))
    job = prepare(folder, str(tmp_path / "fit.yaml"), device="cpu", dtype="fp32")
    found = allocator.Allocator(job, {"base_model": "llama", "recipe_name": "fit"})
    ends = [found.size(tuple(int(pick(s)) for s in found.bytes)) for pick in (np.argmin, np.argmax)]
    limit, scores = {"size": sum(ends) // 2}, tmp_path / "scores"
    recipe = str(tmp_path / "fit.yaml")
    return QuantizeOptions(folder, recipe, tmp_path / "out", (), "cpu", "fp32", limit_of=limit, scores=scores)


def test_both_plans_are_carried_out_and_the_better_one_is_written(options, tmp_path, monkeypatch):
    report = run(options)
    entry = report.allocation
    assert entry.carried_out and not entry.fell_back
    assert "two of them carried out" in (tmp_path / "out/report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.yaml", "out", "scores"]
    _, held_out = tokens_for(prepare(options.model, options.recipe, device="cpu", dtype="fp32"))
    original = prepare(options.model, options.recipe, device="cpu", dtype="fp32").original
    written = open_artifact(next((tmp_path / "out").glob("*.gguf")))
    measured = trial.Trials(original, held_out, torch.device("cpu")).of(written)
    assert entry.kld == pytest.approx(measured.mean, rel=1e-4)  # of GPTQ's result, not of a rounded model
    assert entry.kld < entry.uniform_kld
    monkeypatch.setattr(contest, "solve_all", None)  # what both came to is known
    assert run(QuantizeOptions(**{**vars(options), "out": tmp_path / "again"})).allocation == entry


def test_a_plan_that_nobody_allocated_wins_by_what_a_method_makes_of_it(options, tmp_path, monkeypatch):
    """Rounded it lost; carried out it wins, after an interruption between the two as well."""
    measure, seen = trial.Trials.of, []

    def turned(self, model):
        found = measure(self, model)
        if type(model).__name__ == "Roughly":
            return found
        seen.append(len({layer.format.label for layer in model.layers.values()}))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return Divergence(tuple(x * (0.01 if seen[-1] == 1 else 1.0) for x in found.samples))

    monkeypatch.setattr(trial.Trials, "of", turned)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert {p.name for p in tmp_path.iterdir()} >= {"out.work", "out.other.work"}
    told = []
    report = run(options, told.append)
    assert not any("starting anew" in event.message for event in told)  # nothing of the better one is done twice
    assert seen == [seen[0], 1, 1] and seen[0] > 1  # the first one was measured once
    assert report.allocation.fell_back and report.allocation.carried_out
    assert report.allocation.kld == report.allocation.uniform_kld
    assert len({e.format for e in report.layers if e.format}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.yaml", "out", "scores"]


def test_plan_says_what_a_run_will_do(options):
    from qtool.pipeline.budget import divided

    told = []
    job = prepare(options.model, options.recipe, device="cpu", dtype="fp32", budget=options.limit_of)
    _, entry = divided(job, options.scores, told.append)
    assert any("a run carries both plans out" in event.message for event in told)
    assert not entry.carried_out
    job = prepare(options.model, options.recipe, ("method=rtn",), device="cpu", dtype="fp32", budget=options.limit_of)
    told.clear()
    divided(job, None, told.append)
    assert not any("carries both plans out" in event.message for event in told)
