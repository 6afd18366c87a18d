"""Sweeps over clippings of one group against brute force, with a weight that sets the range but hardly counts."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.numerics.scales.sweep import F32, free_offset, free_scale, offset_trials, signed_trials

NEAR = F32(0.75)


def group(width: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, weight, reach): ordinary weights, and a large one on an input that is nearly dead."""
    rng = np.random.default_rng(3)
    x, weight = rng.normal(0, 0.05, width).astype(F32), np.ones(width, F32)
    x[5], weight[5] = 2.5, 1e-5
    return x, weight, np.minimum(weight, 1) ** F32(0.25)


def error(x: np.ndarray, weight: np.ndarray, scale: float, offset: float, ends: tuple[int, int]) -> float:
    level = np.clip(np.rint((x.astype(float) - offset) / scale), *ends)
    return float((weight * (x - offset - scale * level) ** 2).sum())


@pytest.mark.parametrize("lowest", [-8, -16])
def test_a_scale_is_found_for_what_counts(lowest: int) -> None:
    x, weight, reach = group()
    table = signed_trials(lowest, 64)
    ends, sums = (lowest, -lowest - 1), np.empty((4, table.shape[1]), F32)
    scale, curvature = free_scale(x, weight, reach, NEAR, table, F32(ends[0]), F32(ends[1]), sums)
    tried = [s * r / -lowest for s in (0.16, -0.16, 2.5, -2.5) for r in np.linspace(0.5, 1.5, 200)]
    best = min(error(x, weight, s, 0, ends) for s in tried)
    assert error(x, weight, scale, 0, ends) <= 1.05 * best
    level = np.clip(np.rint(x / scale), *ends)
    assert curvature == pytest.approx((weight * level**2).sum(), rel=0.05)


def test_a_scale_and_an_offset_are_found_for_what_counts() -> None:
    x, weight, reach = group()
    table, ends = offset_trials(15, 64), (0, 15)
    sums = np.empty((4, table.shape[1]), F32)
    scale, offset, _, _, total = free_offset(x, weight, reach, NEAR, F32(np.inf), table, F32(15), sums)
    low, span = float(np.delete(x, 5).min()), float(np.ptp(np.delete(x, 5)))
    best = min(
        error(x, weight, span * r / 15, low + shift * span, ends)
        for r in np.linspace(0.7, 1.2, 60)
        for shift in np.linspace(-0.1, 0.2, 40)
    )
    assert error(x, weight, scale, offset, ends) <= 1.1 * best
    assert total == pytest.approx(weight.sum(), rel=1e-5)
