"""The exact comparison of two choices against sums of what is decoded, where they differ much, little or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.numerics.grids import minifloat
from qtool.numerics.grids.affine import decode_levels, round_to_levels
from qtool.numerics.grids.compare import TIE, better_blocks, casts, steps
from qtool.numerics.grids.minifloat import integer

GRIDS = {"e2m1": minifloat.minifloat(2, 1), "e4m3": minifloat.minifloat(4, 3), "int8": integer(8)}


def errors(w: Tensor, decoded: Tensor, weight: Tensor, blocks: int) -> Tensor:
    """float64 [N, blocks]."""
    return ((decoded.double() - w.double()).square() * weight.double()).view(len(w), blocks, -1).sum(-1)


def stepped(w: Tensor, scale: Tensor, offset: Tensor, ends: tuple[float, float]) -> Tensor:
    codes = round_to_levels(w, scale, offset, *ends)
    return decode_levels(codes, torch.arange(ends[0], ends[1] + 1), scale, offset)


def cast(w: Tensor, scale: Tensor, grid: minifloat.Grid) -> Tensor:
    codes = minifloat.nearest_levels(w, scale, grid)
    return decode_levels(codes, grid.levels(), scale, torch.zeros_like(scale))


def rows(size: float) -> tuple[Tensor, Tensor]:
    """Weights [60, 96] of some size, importances that are zero here and there."""
    g = torch.Generator().manual_seed(5)
    weight = torch.rand(96, generator=g)
    weight[::7] = 0
    return torch.randn(60, 96, generator=g) * size, weight


def close_pairs(scale: Tensor) -> Tensor:
    """Other scales: far from the first ones, by a part in a million, by one bit, and the same."""
    other = scale.clone()
    other[:15] *= 1.1
    other[15:30] *= 1 + 1e-6
    other[30:45] = torch.nextafter(other[30:45], torch.tensor(torch.inf))
    return other


@pytest.mark.parametrize("size", [1e-40, 1e-22, 3e-21, 1e-20, 1e-19, 0.03, 1e18])
@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_integers_are_compared_exactly(blocks: int, size: float) -> None:
    w, weight = rows(size)
    scale = w.view(60, 12, 8).abs().amax(-1) / 7
    scale[3, 2], scale[4] = 0, -scale[4]
    offset = torch.linspace(-1, 1, 12) * scale
    pairs, ends = ((scale, offset), (close_pairs(scale), offset)), (-8.0, 7.0)
    first, second = (errors(w, stepped(w, *pair, ends), weight, blocks) for pair in pairs)
    assert torch.equal(better_blocks(w, *pairs, steps(*ends), weight, blocks), second < first * (1 - TIE))
    assert torch.equal(better_blocks(w, *pairs[::-1], steps(*ends), weight, blocks), first < second * (1 - TIE))
    assert not better_blocks(w, *pairs, steps(*ends), weight, blocks)[45:].any()


@pytest.mark.parametrize("size", [1e-30, 0.03, 1e25])
@pytest.mark.parametrize("name", GRIDS)
def test_floats_are_compared_exactly(name: str, size: float) -> None:
    (w, weight), grid = rows(size), GRIDS[name]
    scale = w.view(60, 12, 8).abs().amax(-1) / grid.highest
    scale[3, 2] = 0
    pairs = [(s, torch.zeros_like(s)) for s in (scale, close_pairs(scale))]
    first, second = (errors(w, cast(w, s, grid), weight, 3) for s, _ in pairs)
    assert torch.equal(better_blocks(w, *pairs, casts(grid), weight, 3), second < first * (1 - TIE))
    assert torch.equal(better_blocks(w, *pairs[::-1], casts(grid), weight, 3), first < second * (1 - TIE))


def test_a_long_row_is_decided_by_its_last_digits() -> None:
    """A hundred thousand weights, of which one is rounded better: in float32 the sums are alike."""
    w = torch.full((1, 131072), 0.25)
    w[0, 77777] = 5.4
    plain, moved = torch.ones(1, 1), torch.full((1, 1), 1 + 2.0**-16)
    zero, weight = torch.zeros(1, 1), torch.ones(131072)
    assert bool(better_blocks(w, (plain, zero), (moved, zero), steps(-8, 7), weight, 1))
    assert not bool(better_blocks(w, (moved, zero), (plain, zero), steps(-8, 7), weight, 1))
