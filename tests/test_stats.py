"""Statistics of inputs against plain sums."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qtool.stats import InputStats, Stat

NEEDS = frozenset({Stat.GRAM, Stat.CHANNELS, Stat.DRIFT})
GENERATOR = torch.Generator().manual_seed(0)
X, X_0 = torch.randn(2, 90, 200, generator=GENERATOR) + 0.5


def assert_equal(stats: InputStats, compared: int) -> None:
    """All tokens are counted, the first ones compared."""
    x, x_0 = X.double(), X_0.double()
    assert stats.tokens == len(X)
    assert stats.gram is not None and stats.drift is not None
    assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-3)
    assert_close(stats.drift[0].double(), (x_0 - x)[:compared].T @ x[:compared], rtol=1e-4, atol=1e-3)
    assert_close(stats.drift[1].double(), x[:compared].T @ x[:compared], rtol=1e-5, atol=1e-3)
    assert_close(stats.importance.double(), x.square().mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.absmax, X.abs().amax(0))


@pytest.mark.parametrize("compared", [30, 60, 90])
def test_batches_are_compared_and_then_counted(compared: int) -> None:
    stats = InputStats(200, NEEDS)
    for start in range(0, 90, 30):
        part = slice(start, start + 30)
        stats.compare(X[part], X_0[part]) if start < compared else stats.add(X[part])
    assert_equal(stats, compared)


def test_parts_are_merged() -> None:
    parts = []
    for begin, compared, end in ((0, 40, 50), (50, 60, 90)):
        stats = InputStats(200, NEEDS)
        stats.compare(X[begin:compared], X_0[begin:compared])
        stats.add(X[compared:end])
        parts.append(stats)
    parts[0].merge(parts[1])
    gram, drift = parts[0].gram, parts[0].drift
    assert gram is not None and drift is not None
    seen = torch.cat([torch.arange(40), torch.arange(50, 60)])
    x, x_0 = X[seen].double(), X_0[seen].double()
    assert_close(gram.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-3)
    assert_close(drift[0].double(), (x_0 - x).T @ x, rtol=1e-4, atol=1e-3)
    assert_close(drift[1].double(), x.T @ x, rtol=1e-5, atol=1e-3)


def test_parts_are_merged_channel_by_channel() -> None:
    parts = []
    for rows in (X[:40], X[40:]):
        parts.append(InputStats(200, frozenset({Stat.CHANNELS})))
        parts[-1].add(rows)
    parts[0].merge(parts[1])
    assert parts[0].tokens == 90
    assert_close(parts[0].importance.double(), X.double().square().mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(parts[0].low, X.amin(0)) and torch.equal(parts[0].high, X.amax(0))


def test_without_comparison_there_is_no_drift() -> None:
    stats = InputStats(200, NEEDS)
    stats.add(X)
    assert stats.drift is None
