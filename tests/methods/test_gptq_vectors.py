"""GPTQ inside GGUF's blocks of 256 columns: uneven levels, ternary ones, and codebooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qtool import registry
from qtool.formats._ggml import BlockFormat
from qtool.methods.gptq import GPTQ, activation_order
from qtool.methods.rtn import RTN
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram
from tests.methods.test_gptq import loss, problem
from tests.reference.vectors import gptq_vectors

MARGIN_DB = {
    "iq4_nl": 4.2,
    "iq4_xs": 4.0,
    "tq1_0": 3.3,
    "tq2_0": 3.3,
    "iq1_s": 2.9,
    "iq1_m": 2.6,
    "iq2_xxs": 3.65,
    "iq2_xs": 3.5,
    "iq2_s": 3.75,
    "iq3_xxs": 3.9,
    "iq3_s": 4.0,
}
"""How much lower the output error is than that of rounding with importances."""


def load(name: str) -> BlockFormat:
    fmt: BlockFormat = registry.load("formats", name)(search="fast")
    return fmt


@pytest.mark.parametrize("name", MARGIN_DB)
def test_output_error_is_below_rounding(name: str) -> None:
    w, stats = problem(n=32, k=512, tokens=2048)
    fmt = load(name)
    rounded = RTN(importance=True).solve(w, stats, fmt).quantized
    solution = GPTQ().solve(w, stats, fmt)
    solved = solution.quantized
    gain = 10 * torch.tensor(loss(w, rounded, stats) / loss(w, solved, stats)).log10()
    assert solution.fallback is None and gain >= MARGIN_DB[name]
    again = fmt.unpack(fmt.pack(solved.codes, solved.params))
    assert torch.equal(fmt.decode(*again), solved.decode())
    for factor in (0.95, 1.05):  # the last descent moves the best scale of coarse codes by one or two per cent
        scaled = replace(solved, params=solved.params | {"d": solved.params["d"] * factor})
        assert loss(w, scaled, stats) > loss(w, solved, stats)


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("name", ["iq1_m", "iq2_xxs", "iq2_xs", "iq3_xxs", "iq3_s"])
def test_codes_equal_the_plain_loop(name: str, order: str) -> None:
    w, stats = problem(n=3, k=256, tokens=1024)
    fmt = load(name)
    book = fmt.codebook()
    assert book is not None
    method = GPTQ(fit="before", rounds=0, order=order, damp=0.01)
    q = method.solve(w, stats, fmt).quantized
    columns = torch.arange(256)
    if order == "activation":
        columns = activation_order(stats[Gram].matrix.diagonal(), (book.width, book.span))
    expected = gptq_vectors(w, stats[Gram].matrix, 0.01, columns.tolist(), fmt, q.params)
    # float32 against float64: a vector that lies between two entries may tip over, and others after it follow
    assert (q.codes != expected).float().mean() <= 0.02


def test_vectors_spans_and_blocks_stay_together_in_the_order_of_their_size() -> None:
    diagonal = torch.rand(512, generator=torch.Generator().manual_seed(3)).mul(5).exp()
    diagonal[64:96] = 0  # several vectors of the same size
    order = activation_order(diagonal, (4, 8, 256))
    assert order.sort().values.equal(torch.arange(512))
    for width in (4, 8, 256):
        kept = order.view(-1, width) // width
        assert bool((kept == kept[:, :1]).all())
    vectors = order.view(2, 32, 2, 4)
    for size in (diagonal[vectors], diagonal[vectors].sum(-1), diagonal[vectors].sum((2, 3))):
        assert bool((size.diff(dim=-1) <= 1e-3).all())
    assert torch.equal(activation_order(diagonal, ()), diagonal.argsort(descending=True, stable=True))


@pytest.mark.parametrize("name", ["iq4_xs", "tq2_0", "iq1_m", "iq2_xxs", "iq3_xxs", "iq3_s"])
def test_every_round_lowers_the_objective(name: str) -> None:
    w, stats = problem(n=16, k=512, tokens=2048)
    losses = [loss(w, GPTQ(rounds=r, damp=1e-4).solve(w, stats, load(name)).quantized, stats) for r in (0, 1, 2)]
    assert losses == sorted(losses, reverse=True) and losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", ["iq4_xs", "tq1_0", "iq1_s", "iq2_xs", "iq3_xxs"])
def test_dead_columns_disturb_nothing(name: str) -> None:
    w, stats = problem(n=16, k=512, tokens=2048)
    gram = stats[Gram].matrix.clone()
    gram[:, 200:300] = gram[200:300] = 0  # across the border of two blocks
    dead = InputStats(512, stats.needs)
    dead[Gram].matrix, dead.tokens = gram, stats.tokens
    fmt = load(name)
    rounded = RTN(importance=True).solve(w, dead, fmt).quantized
    solved = GPTQ().solve(w, dead, fmt).quantized
    assert bool(solved.decode().isfinite().all())
    assert loss(w, solved, dead) < loss(w, rounded, dead)
    error = (solved.decode() - w)[:, 200:300].square().sum() / w[:, 200:300].square().sum()
    assert error < 0.6


def test_threads_do_not_change_vectors(use_threads: Callable[[int], None]) -> None:
    w, stats = problem(n=13, k=256, tokens=512)
    results = []
    for count in (1, 3):
        use_threads(count)
        results.append(GPTQ().solve(w, stats, load("iq3_xxs")).quantized)
    assert torch.equal(results[0].codes, results[1].codes)
    assert all(torch.equal(p, results[1].params[name]) for name, p in results[0].params.items())
