"""Scale searches against brute force over a dense grid of scales, zero points and offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.numerics.scales import search

SHAPES = {
    "normal": lambda g: torch.randn(12, 32, generator=g),
    "heavy": lambda g: torch.randn(12, 32, generator=g) ** 3,
}


def weighted_errors(x, scale, zero, offset, lowest, highest, w) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Of each of M choices: scale, zero and offset are numbers or [M]; x, w [C]."""
    scale, zero, offset = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1) for v in (scale, zero, offset))
    q = torch.where(scale != 0, ((x - offset) / scale + zero).round().clamp(lowest, highest), zero)
    return (w * (x - scale * (q - zero) - offset) ** 2).sum(-1)


def weighted_error(
    x: torch.Tensor, scale: float, zero: float, offset: float, lowest: int, highest: int, w: torch.Tensor
) -> float:
    return float(weighted_errors(x, scale, zero, offset, lowest, highest, w))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_is_near_the_optimum(bits: int, shape: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    x, w = SHAPES[shape](generator), torch.rand(32, generator=generator) + 0.01
    lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
    scales = search.symmetric(x, w, 32, lowest, highest)
    found = best = 0.0
    for row, scale in zip(x, scales[:, 0].tolist(), strict=True):
        grid = np.linspace(0.3, 1.3, 400) * float(row.abs().max()) / -lowest
        best += float(weighted_errors(row, [*grid, *-grid], 0, 0, lowest, highest, w).min())
        found += weighted_error(row, scale, 0, 0, lowest, highest, w)
    assert found <= 1.05 * best
    scaled = sum(
        weighted_error(r, s * 1.01, 0, 0, lowest, highest, w) for r, s in zip(x, scales[:, 0].tolist(), strict=True)
    )
    assert scaled > found


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 64)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_positive_scale_stays_unless_a_weight_takes_the_level_of_one_side(bits, importance) -> None:  # type: ignore[no-untyped-def]
    """Rows that lie on the grid: with both signs, with the one level more below zero, with that level above zero."""
    end = 1 << bits - 1
    levels = torch.arange(1.0 - end, end).repeat(64)[:64]
    rows = torch.stack([levels, -levels, levels, levels])
    rows[2, 0], rows[3, 0] = -end, end
    found = search.symmetric(rows * 0.25, importance, 64, -end, end - 1)[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 0.25, -0.25]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_are_near_the_optimum(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x, w = torch.randn(8, 32, generator=generator) + 0.7, torch.rand(32, generator=generator) + 0.01
    lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
    scale, zero = search.zero_point(x, w, 32, lowest, highest)
    assert bool((zero == zero.round()).all()) and bool((zero >= lowest).all()) and bool((zero <= highest).all())
    found = best = 0.0
    for row, s, z in zip(x, scale[:, 0].tolist(), zero[:, 0].tolist(), strict=True):
        span = float(row.max().clamp_min(0) - row.min().clamp_max(0)) / (highest - lowest)
        grid = np.linspace(0.4, 1.2, 120) * span
        pairs = np.array([(g, i) for g in grid for i in range(lowest, highest + 1)])
        best += float(weighted_errors(row, pairs[:, 0], pairs[:, 1], 0, lowest, highest, w).min())
        found += weighted_error(row, s, z, 0, lowest, highest, w)
    assert found <= 1.08 * best


@pytest.mark.parametrize("bits", [4, 5])
def test_free_offsets_are_near_the_optimum(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x, w = torch.randn(8, 32, generator=generator) + 0.3, torch.rand(32, generator=generator) + 0.01
    highest = (1 << bits) - 1
    scale, offset = search.free_offset(x, w, 32, highest)
    found = best = 0.0
    for row, s, o in zip(x, scale[:, 0].tolist(), offset[:, 0].tolist(), strict=True):
        span = float(row.max() - row.min())
        lows = float(row.min()) + np.linspace(-0.05, 0.25, 40) * span
        pairs = np.array([(span * r / highest, a) for r in np.linspace(0.7, 1.1, 60) for a in lows])
        best += float(weighted_errors(row, pairs[:, 0], 0, pairs[:, 1], 0, highest, w).min())
        found += weighted_error(row, s, 0, o, 0, highest, w)
    assert found <= 1.08 * best


def test_importance_moves_the_scale_towards_what_counts() -> None:
    x = torch.cat([torch.full((1, 31), 0.1), torch.tensor([[1.0]])], dim=1)
    outlier = search.symmetric(x, torch.tensor([1e-6] * 31 + [1.0]), 32, -2, 1)
    crowd = search.symmetric(x, torch.tensor([1.0] * 31 + [1e-6]), 32, -2, 1)
    assert abs(float(outlier)) > 0.45
    assert min(abs(abs(float(crowd)) - 0.1), abs(abs(float(crowd)) - 0.05)) < 1e-3


def test_groups_are_independent_and_zeros_stay_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=generator)
    x[:, 32:64] = 0
    together = search.symmetric(x, None, 32, -8, 7)
    alone = torch.cat([search.symmetric(x[:, i : i + 32], None, 32, -8, 7) for i in (0, 32, 64)], dim=1)
    assert torch.equal(together, alone)
    assert bool((together[:, 1] == 0).all())
