"""Gram matrices against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.numerics.solving import gram
from qtool.numerics.solving.gram import GramSum


def tokens(count: int, k: int, seed: int = 0) -> Tensor:
    """Correlated inputs with channels of very different size, bfloat16 [count, K]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return (mixed * torch.logspace(-3, 2, k)).bfloat16()


def relative(found: Tensor, batches: list[Tensor]) -> Tensor:
    """Error of each entry, relative to the roots of its two diagonal entries."""
    x = torch.cat(batches).double()
    wanted = x.T @ x
    size = wanted.diagonal().sqrt().clamp_min(1e-30)
    return (found.double() - wanted) / (size[:, None] * size)


@pytest.fixture(params=[True, False], ids=["rounded", "float32"])
def rounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to sum, whatever the processor has; integers are multiplied exactly everywhere."""
    monkeypatch.setattr(gram, "counts_fast", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("k", [48, 200, 576])
def test_it_is_the_sum_of_products(k: int, rounded: bool) -> None:
    batches = [tokens(count, k, seed) for seed, count in enumerate((512, 300, 1))]
    found = GramSum(k)
    for batch in batches:
        found.add(batch)
    total = found.total()
    error = relative(total, batches)
    assert error.abs().max() < (0.02 if rounded else 1e-5)
    assert error.square().mean().sqrt() < (3e-3 if rounded else 1e-6)
    assert torch.equal(total, total.T)
    assert torch.linalg.eigvalsh(total.double() / total.diagonal().double().mean()).min() > -1e-6


def test_rounding_adds_little_to_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "counts_fast", lambda: True)
    x = tokens(4096, 64)
    found = GramSum(64)
    found.add(x)
    added = relative(found.total(), [x]).diagonal().mean()
    assert float(added) == pytest.approx(gram.REACH**2 / (12 * 127**2), rel=0.2)


def test_what_stands_out_is_exact(rounded: bool) -> None:
    """A token that is a thousand times larger, a channel that wakes up late, and one that never does."""
    first, late = tokens(256, 32), tokens(256, 32, 1)
    first[7] *= 1000
    first[:, 3] = 0
    first[:, 5] = late[:, 5] = 0
    found = GramSum(32)
    found.add(first)
    found.add(late)
    error = relative(found.total(), [first, late])
    assert error[7].abs().max() < 2e-3
    assert error[3].abs().max() < 2e-3
    assert not found.total()[5].any()


def test_integers_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "counts_fast", lambda: True)
    monkeypatch.setattr(gram, "MOST_TOKENS", 1000)
    batches = [tokens(400, 32, seed) for seed in range(8)]
    found = GramSum(32)
    for batch in batches:
        found.add(batch)
        assert found.summed <= 1000
    assert relative(found.total(), batches).abs().max() < 0.02


def test_not_a_number_stays_visible(rounded: bool) -> None:
    x = tokens(64, 32)
    x[3, 4] = torch.nan
    found = GramSum(32)
    found.add(tokens(64, 32))
    found.add(x)
    assert found.total()[4].isnan().all()
