"""Grids of small floats against their definition bit by bit, rounding at every tie, and scales by brute force."""

from __future__ import annotations

import bisect
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qtool.numerics.grids import minifloat
from qtool.numerics.grids.minifloat import Grid, ceil_power, floor_power, nearest_power

FLOATS = [(e, m) for e in range(1, 8) for m in range(7) if 3 <= 1 + e + m <= 8]
GRIDS = {f"e{e}m{m}": minifloat.minifloat(e, m) for e, m in FLOATS} | {
    f"int{b}": minifloat.integer(b) for b in range(2, 9)
}
FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}
"""The first bit pattern that is no number."""


def value(pattern: int, e: int, m: int) -> Fraction:
    """A bit pattern without its sign, by the definition of binary floats."""
    exponent, fraction = pattern >> m, Fraction(pattern & ((1 << m) - 1), 1 << m)
    bias = (1 << (e - 1)) - 1
    return fraction * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + fraction) * Fraction(2) ** (exponent - bias)


def magnitudes(grid: Grid) -> list[float]:
    levels = grid.levels().tolist()
    assert levels == sorted(levels) and levels == [-x for x in reversed(levels)]
    return levels[len(levels) // 2 :]


@pytest.mark.parametrize(("e", "m"), FLOATS, ids=str)
def test_levels_are_the_bit_patterns_in_order(e: int, m: int) -> None:
    count = FINITE.get(f"e{e}m{m}", 1 << (e + m))
    assert magnitudes(minifloat.minifloat(e, m)) == [float(value(p, e, m)) for p in range(count)]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bits_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    values = torch.arange(FINITE[name], dtype=torch.uint8).view(dtype).float()
    assert magnitudes(GRIDS[name]) == values.tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_symmetric_and_equal_floats_of_one_exponent_bit(bits: int) -> None:
    top = (1 << (bits - 1)) - 1
    assert minifloat.integer(bits).levels().tolist() == list(range(-top, top + 1))
    if bits > 2:
        assert minifloat.minifloat(1, bits - 2).levels().diff().unique().numel() == 1


@pytest.mark.parametrize(("name", "exponent"), [("e2m1", 2), ("e4m3", 8), ("e5m2", 15), ("e2m3", 2), ("int8", 6)])
def test_exponent_of_the_largest_level(name: str, exponent: int) -> None:
    assert GRIDS[name].exponent == exponent


@pytest.mark.parametrize("name", GRIDS)
def test_step_of_uniform_grids(name: str) -> None:
    steps = GRIDS[name].levels().diff().unique().tolist()
    assert GRIDS[name].step == (steps[0] if len(steps) == 1 else None)


def probes(levels: list[float]) -> Tensor:
    """Every level, every tie, their neighbours in float32, and what lies beyond, with both signs; float32 [1, C]."""
    ties = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    points = torch.tensor([*levels, *ties, levels[-1] * 1.2, levels[-1] * 1e6, 1e-40, 3e38])
    points = torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(-torch.inf))])
    return torch.cat([points, -points])[None].clamp(-3e38, 3e38)


def slow_index(x: float, levels: list[float], mantissa: int) -> int:
    """The nearest level counted from the most negative one, in exact arithmetic.

    Ties go to the even bit pattern; without a mantissa to the larger number, but for that of zero and the first.
    """
    size = abs(x)
    upward = mantissa == 0 and size > levels[1]
    above = bisect.bisect_left(levels, size)
    near = range(max(0, above - 1), min(above + 1, len(levels)))
    best = min(near, key=lambda i: (abs(Fraction(levels[i]) - Fraction(size)), -i if upward else i % 2))
    return len(levels) - 1 + (-best if x < 0 else best)


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_at_every_tie(name: str) -> None:
    levels = magnitudes(GRIDS[name])
    x = probes(levels)
    for scale in (1.0, 2.0**-100):
        found = minifloat.nearest_levels(x * scale, torch.tensor([[scale]]), GRIDS[name])
        small = x.abs() * scale >= 2.0**-120  # products below float32's normal numbers are not what was meant
        expected = torch.tensor([[slow_index(v, levels, GRIDS[name].mantissa) for v in x[0].tolist()]])
        assert torch.equal(found[small].long(), expected[small])


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_rounding_is_a_saturating_cast(name: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4096, generator=g) * torch.logspace(-6, 6, 4096, 10)
    scale = torch.rand(8, 2, generator=g) + 0.1
    grid = GRIDS[name]
    found = grid.levels()[minifloat.nearest_levels(x, scale, grid).long()]
    cast = (x / scale.repeat_interleave(2048, 1)).clamp(-grid.highest, grid.highest).to(dtype)
    assert torch.equal(found, cast.float())


def test_a_scale_of_zero_gives_zeros() -> None:
    codes = minifloat.nearest_levels(torch.tensor([[1.0, -1.0, 0.0, 5.0]]), torch.tensor([[0.0, 1.0]]), GRIDS["e2m1"])
    assert GRIDS["e2m1"].levels()[codes.long()].tolist() == [[0, 0, 0, 4]]  # 5 is a tie of 4 and 6


def test_largest_magnitudes_and_what_is_none() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(minifloat.largest(x, 3), x.view(5, 3, 4).abs().amax(-1))
    x[1, 5], x[2, 0], x[3, 11] = torch.nan, torch.inf, -torch.nan
    bad = ~minifloat.largest(x, 3).isfinite()
    assert bad.nonzero().tolist() == [[1, 1], [2, 0], [3, 2]]


def test_powers_of_two() -> None:
    x = torch.tensor([0.0, 1.0, 1.49, 1.5, 1.51, 2.0, 2.999, 3.0, 0.3, 2.0**-130, 3 * 2.0**-140])
    floors = [0.0] + [2.0 ** math.floor(math.log2(v)) for v in x[1:].tolist()]
    ceils = [0.0] + [2.0 ** math.ceil(math.log2(v)) for v in x[1:].tolist()]
    assert floor_power(x).tolist() == floors
    assert ceil_power(x).tolist() == ceils
    for v, near, low, high in zip(x.tolist(), nearest_power(x).tolist(), floors, ceils, strict=True):
        assert abs(v - near) == min(abs(v - low), abs(v - high))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("free", [False, True], ids=["stored", "free"])
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "int4"])
def test_best_scale_is_that_of_brute_force(name: str, free: bool, weighted: bool) -> None:
    g = torch.Generator().manual_seed(2)
    x, importance = torch.randn(6, 32, generator=g), torch.rand(32, generator=g) if weighted else None
    grid = GRIDS[name]
    tries = torch.rand(6, 2, 9, generator=g) * 2 / grid.highest
    found = minifloat.best_scale(x, importance, tries, grid, free)
    levels = torch.tensor(magnitudes(grid)).double()
    weight = torch.ones(32).double() if importance is None else importance.double()
    for n in range(6):
        for k in range(2):
            v, p = x[n, k * 16 : k * 16 + 16].double().abs(), weight[k * 16 : k * 16 + 16]
            errors = {}
            for s in tries[n, k].double():
                level = levels[(v[:, None] / s - levels).abs().argmin(1)]
                s = (p * v * level).sum() / (p * level * level).sum() if free else s
                errors[float(s)] = float((p * (v - s * level) ** 2).sum())
            best = min(errors, key=errors.__getitem__)
            assert float(found[n, k]) == pytest.approx(best, rel=1e-5)
