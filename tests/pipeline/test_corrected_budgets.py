"""Budgets whose candidates keep corrections beside the codes: sizes, costs, what is preferred, what is stored."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.allocate.decisions import decisions
from qtool.allocate.slopes import Slopes
from qtool.calibrate.inputs import quantize_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import RecipeError
from qtool.formats._spelling import parse_format
from qtool.models import open_artifact
from qtool.pipeline import trial
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.events import silent
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.scores import ScoreFile
from qtool.pipeline.sensitivity import Pricing

BODY = """
recipe: 1
name: ranks
calibration: {data: builtin, samples: 4, length: 64}
method: {rtn: {importance: true}}
layers:
  - {match: "*", weights: int4-g32, activations: int4-token}
budget:
  formats:
    - {weights: int4-g32, activations: int4-token}
    - {weights: int4-g32, activations: int4-token, residuals: [{low_rank: {rank: 4, whiten: WHITEN, start: START}}]}
    - {weights: int4-g32, activations: int4-token, residuals: [{sparse: {share: 0.02}}]}
    - {weights: int8-channel, activations: int4-token}
  samples: 3
  held_out: 4
export: [{to: qtool}]
"""
PLAIN = "int4-g32 with int4-token inputs"
RANK = "int4-g32 + low_rank rank 4{} with int4-token inputs"
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def written(tmp_path):
    def write(whiten="true", start="error"):
        (tmp_path / "ranks.yaml").write_text(BODY.replace("WHITEN", whiten).replace("START", start))
        return str(tmp_path / "ranks.yaml")

    return write


def opened(folder, recipe, *overrides, **limit):
    return prepare(str(folder), recipe, overrides, device="cpu", dtype="fp32", budget=limit)


def span(job):
    """Bytes of the smallest file that a budget allows, and of the largest."""
    allocator = Allocator(job, {"base_model": "llama", "recipe_name": "ranks"})
    return [allocator.size(tuple(int(pick(s)) for s in allocator.bytes)) for pick in (np.argmin, np.argmax)]


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_the_emitted_file_fits(share, written, tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint("llama"), tmp_path / "out"
    least, most = span(opened(folder, written()))
    limit = int(least + share * (most - least))
    report = run(QuantizeOptions(str(folder), written(), out, device="cpu", dtype="fp32", limit_of={"size": limit}))
    files = sum(p.stat().st_size for p in out.iterdir() if p.suffix == ".safetensors" or "index.json" in p.name)
    assert files == report.allocation.nbytes <= limit
    assert report.allocation.nbytes > limit - 0.2 * (most - least)


@pytest.mark.parametrize("start", ["error", "weight"])
def test_costs_are_those_of_a_slow_loop(start, written, tiny_checkpoint):
    """With inputs rounded for the codes, and read as they were by the product beside them."""
    job = opened(tiny_checkpoint("llama"), written(start=start))
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    tokens, _ = tokens_for(job)
    found = Pricing(job, open_, tokens).run(silent)
    slopes = Slopes(Walker(job.checkpoint, job.device, job.dtype), tokens, 0)
    seen = {name: s for _, block in slopes.blocks() for name, s in block.items()}
    x, squares = seen[NAME].x.double(), seen[NAME].squares.double()
    w = job.checkpoint.tensor(f"{NAME}.weight").float()
    fmt, importance = parse_format("int4-g32"), x.float().square().mean(0)

    def rounded(matrix):
        params = fmt.fit(matrix.float(), importance)
        return fmt.decode(fmt.snap(matrix.float(), params, importance), params).double()

    root = torch.linalg.cholesky(x.T @ x)
    alone = rounded(w)
    u, s, vt = torch.linalg.svd((w.double() - alone if start == "error" else w.double()) @ root)
    product = (u[:, :4] * s[:4]) @ torch.linalg.solve(root.T, vt[:4].T).T
    codes = alone if start == "error" else rounded(w - product)
    x_hat = quantize_tokens(x.float(), parse_format("int4-token")).double()
    cost = [0.0, 0.0]
    for t in range(len(x)):
        outputs = w.double() @ x[t]
        for i, made in enumerate((alone @ x_hat[t], codes @ x_hat[t] + product @ x[t])):
            cost[i] += 0.5 * float((squares[t] * (outputs - made).square()).sum()) / tokens.numel()
    label = RANK.format(" start weight" if start == "weight" else "")
    assert found.costs[NAME][PLAIN] == pytest.approx(cost[0], rel=1e-3)
    assert found.costs[NAME][label] == pytest.approx(cost[1], rel=0.02)  # float16
    assert cost[1] < 0.95 * cost[0]


def with_product(source, folder):
    """A model of which one matrix is a large product of rank 4 and small noise."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors, draw = load_file(file), torch.Generator().manual_seed(0)
    w = tensors[f"{NAME}.weight"].float()
    left, right = (torch.randn(shape, generator=draw) for shape in ((len(w), 4), (4, w.shape[1])))
    tensors[f"{NAME}.weight"] = (2 * w.std() * left @ right + 0.05 * w).to(torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_what_has_a_low_rank_gets_it(written, tiny_checkpoint, tmp_path):
    folder, recipe = with_product(tiny_checkpoint("llama"), tmp_path / "model"), written(start="weight")
    least, most = span(opened(folder, recipe))
    allocator = Allocator(opened(folder, recipe, size=(3 * least + most) // 4), {"base_model": "m", "recipe_name": "r"})
    samples, held_out = tokens_for(allocator.job)
    allocator.score(samples, held_out, tmp_path / "scores", True, "", silent)
    plan = allocator.plan(allocator.fitting(allocator.limit))
    chosen = {p.module.name: p for p in plan.layers if p.format}
    assert [r.name() for r in chosen[NAME].residuals] == ["low_rank"]
    others = [p for name, p in chosen.items() if name != NAME]
    assert sum(any(r.name() == "low_rank" for r in p.residuals) for p in others) < len(others) / 2
    kept = ScoreFile(tmp_path / "scores", allocator.scores.identity, True).found.corrections
    for name, own in allocator.scores.found.corrections.items():
        for label, several in own.items():
            for mine, read in zip(several, kept[name][label], strict=True):
                assert all(torch.equal(mine[key], read[key]) for key in mine.keys() | read.keys())


@pytest.mark.parametrize("start", ["error", "weight"])
def test_divergence_of_a_trial_is_that_of_the_written_file(start, written, tiny_checkpoint, tmp_path):
    """Corrections of the trial are found on other samples than those of the file, but do not look at any."""
    folder, recipe = tiny_checkpoint("llama"), written("false", start)
    residuals = f"[{{low_rank: {{rank: 4, whiten: false, start: {start}}}}}]"
    formats = f"[{{weights: int4-g32, activations: int4-token, residuals: {residuals}}}]"
    job = opened(folder, recipe, f"budget.formats={formats}")
    allocator = Allocator(job, {})
    samples, held_out = tokens_for(job)
    allocator.score(samples, held_out, tmp_path / "scores", True, "", silent)
    chosen = (0,) * len(allocator.open)
    assert all(p.residuals for d in allocator.open for p in d.options[0])
    overrides = (f"layers.0.residuals={residuals}", "budget=null")
    run(QuantizeOptions(str(folder), recipe, tmp_path / "out", overrides, "cpu", "fp32"))
    model = open_artifact(tmp_path / "out")
    found = trial.Trials(HFCheckpoint(folder), held_out, torch.device("cpu")).of(model)
    assert allocator.measure(chosen).mean == pytest.approx(found.mean, rel=0.05)


TWO_BITS = "{type: bilevel, bits: 2, group: 32, second: 4}"
SHARING = [
    f"weights: {TWO_BITS}, residuals: [{{codes: {{format: int2-g32, share: {s}, unit: 32}}}}]" for s in (0.1, 0.25, 0.5)
]


def test_shares_of_groups_with_more_bits_are_the_best_of_all_combinations(tiny_checkpoint, tmp_path):
    """Those of `fast-2bit-fit`, for four matrices with three shares to choose from."""
    small = [
        "calibration.samples=4",
        "calibration.length=64",
        "budget.samples=3",
        "budget.held_out=2",
        "budget.like=null",
    ]
    small.append("budget.formats=[" + ", ".join(f"{{{text}}}" for text in SHARING) + "]")
    rules = ", ".join(f"{{match: '*.{role}_proj', {SHARING[1]}}}" for role in ("down", "o"))
    settings = (*small, f"layers=[{rules}, {{match: '*', keep: true}}]")
    least, most = span(opened(tiny_checkpoint("llama"), "fast-2bit-fit", *settings))
    limit = (3 * least + 2 * most) // 5
    allocator = Allocator(opened(tiny_checkpoint("llama"), "fast-2bit-fit", *settings, size=limit), {})
    samples, held_out = tokens_for(allocator.job)
    allocator.score(samples, held_out, tmp_path / "scores", True, "", silent)
    costs = [d.costs(allocator.scores.found.costs) for d in allocator.open]
    assert [len(own) for own in costs] == [3] * 4
    for own in costs:
        assert own[0] > 1.05 * own[1] > 1.05 * 1.05 * own[2]
    fitting = [c for c in itertools.product(range(3), repeat=4) if allocator.size(c) <= limit]
    assert 10 < len(fitting) < 71
    best = min(fitting, key=lambda c: sum(own[i] for own, i in zip(costs, c, strict=True)))
    assert len(set(best)) > 1
    assert allocator.fitting(limit) == best


def test_what_a_candidate_cannot_be(tiny_checkpoint, written):
    with pytest.raises(RecipeError, match="a layer that is kept is exact"):
        opened(tiny_checkpoint("llama"), written(), "budget.formats=[{keep: true, residuals: [low_rank]}]")
    folder = tiny_checkpoint("llama-tied")
    plain = "{weights: int4-g32, activations: int4-token}"
    many = f"budget.formats=[{plain}, {{weights: int4-g32, residuals: [{{low_rank: {{rank: 4000}}}}]}}]"
    job = opened(folder, written(), many, size=10**6)
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    assert {len(d.options) for d in open_} == {1}  # no matrix has so many
    recipe = job.plan.recipe
    assert type(recipe).model_validate(recipe.model_dump(mode="json")).budget == recipe.budget
