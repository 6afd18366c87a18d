"""GPTQ on formats with two levels of scales, fitted by super-blocks, against the plain loop and against rounding."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._spelling import parse_format
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.stats.gram import Gram
from tests.methods.test_gptq import by_activation, loss, problem
from tests.reference.gptq import gptq, gptq_by_group

NAMES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


@pytest.mark.parametrize("name", ["q2_k", "q6_k"])
def test_codes_equal_the_plain_loop(name: str) -> None:
    w, stats = problem(n=8, k=256, tokens=512)
    fmt = parse_format(name)
    q = GPTQ(fit="before", rounds=0, damp=0.01).solve(w, stats, fmt).quantized
    expected = gptq(w, stats[Gram].matrix, 0.01, by_activation(stats), fmt, q.params)
    assert (q.codes != expected).float().mean() <= 0.004  # float32 against float64: weights between two levels


def test_a_super_block_is_fitted_when_the_walk_reaches_it() -> None:
    w, stats = problem(n=8, k=512, tokens=1024)
    fmt = parse_format("q4_k")
    method = GPTQ(fit="walk", rounds=0, damp=0.01)
    q = method.solve(w, stats, fmt).quantized
    order, factor, _ = method._factor(stats, 256)
    weight = torch.empty(512)
    weight[order] = factor.diagonal().square().reciprocal()
    expected = gptq_by_group(w, stats[Gram].matrix, 0.01, order.tolist(), fmt.on_the_way(), weight)
    assert ((q.decode() - expected).abs() > 1e-4).float().mean() <= 0.03
    assert torch.allclose(q.decode().double().norm(), expected.norm(), rtol=2e-3)


GAIN_DB = {"q2_k": 3.0, "q3_k": 3.6, "q4_k": 3.5, "q5_k": 3.4, "q6_k": 3.5}
"""How much lower the output error is than that of rounding with the same importance-weighted search."""


@pytest.mark.parametrize("name", NAMES)
def test_output_error_is_far_below_rounding(name: str) -> None:
    w, stats = problem(n=48, k=512, tokens=2048)
    fmt = parse_format(name)
    solved = GPTQ().solve(w, stats, fmt).quantized
    rounded = loss(w, RTN(importance=True).solve(w, stats, fmt).quantized, stats)
    gain = 10 * torch.tensor(rounded / loss(w, solved, stats)).log10()
    assert gain >= GAIN_DB[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_round_lowers_the_objective(name: str) -> None:
    w, stats = problem(n=32, k=512, tokens=2048)
    fmt = parse_format(name)
    losses = [loss(w, GPTQ(rounds=r, damp=1e-4).solve(w, stats, fmt).quantized, stats) for r in (0, 1, 2)]
    assert losses[2] < losses[1] < 0.9 * losses[0]
