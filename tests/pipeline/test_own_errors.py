"""What GPTQ's own codes cost a budget, and rounded models that are as far away as it would take them."""

from __future__ import annotations

import pytest
import torch

from qtool.allocate.decisions import decisions
from qtool.allocate.slopes import Slopes
from qtool.calibrate.walker import Walker
from qtool.formats._spelling import parse_format
from qtool.methods.gptq import GPTQ
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.events import silent
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import prepare
from qtool.pipeline.roughly import Roughly
from qtool.pipeline.sensitivity import Pricing
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram

RECIPE = """
recipe: 1
name: own
calibration: {data: builtin, samples: 4, length: 64}
method: gptq
layers:
  - {match: "role:embedding", weights: q8_0, method: {gptq: {damp: 0.1}}}
  - {match: "role:v", weights: q8_0, method: {rtn: {importance: true}}}
  - {match: "*", weights: q8_0}
budget: {formats: [q4_0, q8_0], samples: 3, held_out: 4}
export: [{to: gguf}]
"""
UP, EMBEDDING = "model.layers.1.mlp.up_proj", "model.embed_tokens"


@pytest.fixture
def priced(tiny_checkpoint, tmp_path):
    def found(*overrides):
        (tmp_path / "own.yaml").write_text(RECIPE)
        folder = str(tiny_checkpoint("llama-tied"))
        job = prepare(folder, str(tmp_path / "own.yaml"), overrides, device="cpu", dtype="fp32", budget={})
        open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
        tokens, _ = tokens_for(job)
        return job, tokens, Pricing(job, open_, tokens).run(silent)

    return found


def grown(x, damp):
    """How much larger errors are elsewhere: by eigenvalues, which nothing in qtool looks at."""
    values = torch.linalg.eigvalsh(x.double().T @ x.double())
    freedom = float((values / (values + damp * values.mean())).sum())
    return (1 - freedom / len(x)) ** -2


def by_gptq(w, x, fmt, damp):
    stats = InputStats(x.shape[1], frozenset({Gram}))
    stats.add(x)
    return GPTQ(damp=damp).solve(w, stats, fmt).quantized.decode().double()


def test_costs_are_those_of_codes_that_gptq_chose(priced):
    job, tokens, found = priced()
    slopes = Slopes(Walker(job.checkpoint, job.device, job.dtype), tokens, 0)
    seen = {name: s for _, block in slopes.blocks() for name, s in block.items()}[UP]
    w = job.checkpoint.tensor(f"{UP}.weight").float()
    w_hat, cost = by_gptq(w, seen.x, parse_format("q4_0"), 0.02), 0.0
    for t in range(len(seen.x)):
        error = (w.double() - w_hat) @ seen.x[t].double()
        cost += 0.5 * float((seen.squares[t].double() * error * error).sum())
    cost *= grown(seen.x, 0.02) / tokens.numel()
    assert 1.1 < grown(seen.x, 0.02) < 3
    assert found.costs[UP]["q4_0"] == pytest.approx(cost, rel=2e-3)


def test_the_cost_of_a_shared_matrix_that_gptq_chose(priced, monkeypatch):
    monkeypatch.setattr("qtool.pipeline.sensitivity.ROWS", 10**6)
    job, tokens, found = priced()
    slopes = Slopes(Walker(job.checkpoint, job.device, job.dtype), tokens, 0)
    list(slopes.blocks())
    w = job.checkpoint.tensor(f"{EMBEDDING}.weight").float()
    seen = slopes.head.seen(torch.arange(len(w)))
    error = w.double() - by_gptq(w, seen.x, parse_format("q4_0"), 0.1)
    head = looked_up = 0.0
    for t, token in enumerate(tokens.flatten().tolist()):
        head += 0.5 * float((seen.squares[t].double() * (error @ seen.x[t].double()).square()).sum())
        looked_up += 0.5 * float((slopes.embedded.flatten(0, 1)[t].double() * error[token].square()).sum())
    cost = (head * grown(seen.x, 0.1) + looked_up) / tokens.numel()
    assert found.costs[EMBEDDING]["q4_0"] == pytest.approx(cost, rel=5e-4)


def test_a_rounded_model_is_as_far_away_as_the_method_takes_it(priced):
    """Errors of rounding, made smaller until they cost what the method's do; elsewhere they are as they were."""
    job, tokens, found = priced("budget.like=gguf-q4_0")
    of = Allocator(job, {"base_model": "llama", "recipe_name": "own"})
    rough = Roughly(type(job)(**{**vars(job), "plan": of.plan((0,) * len(of.open))}), *found.known)
    slopes = Slopes(Walker(job.checkpoint, job.device, job.dtype), tokens, 0)
    seen = {name: s for _, block in slopes.blocks() for name, s in block.items()}
    for name in (UP, "model.layers.1.self_attn.v_proj"):
        error = (job.checkpoint.tensor(f"{name}.weight").double() - rough.tensor(f"{name}.weight").double()).T
        x, squares = seen[name].x.double(), seen[name].squares.double()
        cost = float(((x @ error).square() * squares).sum()) / 2 / tokens.numel()
        assert found.costs[name]["q4_0"] == pytest.approx(cost, rel=1e-3)
    assert torch.equal(rough.rows(f"{UP}.weight", 3, 9), rough.tensor(f"{UP}.weight")[3:9])
    assert set(found.shares) == {m for m in found.costs if not m.endswith("v_proj")}


def test_few_tokens_and_other_formulas_know_rounding_only(priced):
    _, _, own = priced()
    _, _, few = priced("calibration.min_tokens=1000")
    _, _, trace = priced("budget.scores=trace")
    assert not few.shares and not trace.shares and own.shares
    for module, factors in own.shares.items():
        for label, factor in factors.items():
            assert own.costs[module][label] == pytest.approx(few.costs[module][label] * factor**2, rel=1e-6)
