"""The exact comparison in which a search ends: its choice stays only if it is really better than that of a simple rule.

Searches choose among many candidates by fast sums in float32, whose order follows the processor's vector registers:
what they find is good, not sure to be better than a rule without a search. So each ends here. Of two choices of
parameters, the second is taken if the error of what a runtime decodes is smaller by more than `TIE`. Errors are summed
in float32 first, with a bound on what that may be off by, and in float64 where this leaves a doubt. Their terms have
one sign, so that a sum in float64 is the same to 1e-13 in whatever order, and the decision is the same everywhere.

Shape letters: N rows, C columns, G groups of C / G columns, S blocks of C / S columns, each of whole groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.grids.minifloat import ROUNDER, Grid, inverse_step, nearest_level, power_of
from qtool.numerics.threads.parallel import over_rows

F32 = np.float32
TIE = 1e-9
"""Errors that differ by less, relative to the first one, are equal: then the first choice stays."""
ORDER = {"reassoc"}
"""Freedom of the compiler: sums, and nothing else. NaN and infinity count: they are a doubt."""
NONE = {"nsz"}
"""No freedom that changes a number. An empty set would be that of whoever has a function compiled."""
PART = 512
"""Terms that are summed in float32; sums of parts are added in float64."""
ROUNDINGS = 8
"""Of a term of a sum in float32, before it is added."""
AT_TIES = 12
"""The same for each level up to the largest: a quotient by way of the inverse may round to the other side of a tie."""
LEAST = 2.0**-100
"""Below this, squares may be too small for float32."""


@njit(nogil=True, cache=True, error_model="numpy", fastmath=NONE)
def step_error(x, s, o, inverse, zero, lowest, highest):  # type: ignore[no-untyped-def]
    """What x lacks of its decoded level, computed as `affine` does; levels are consecutive integers."""
    return x - (min(max(np.rint((x - zero) * inverse), lowest), highest) * s + o)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ORDER)
def rough_step_errors(x, weight, first, second, lowest, highest):  # type: ignore[no-untyped-def]
    """Weighted squared errors of a group x [C] with two pairs (scale, offset), in float32."""
    (s, o), (t, p) = first, second
    inverse, zero = (F32(1) / s, o) if s != 0 else (F32(0), F32(0))
    other, origin = (F32(1) / t, p) if t != 0 else (F32(0), F32(0))
    before, after = F32(0), F32(0)
    for j in range(len(x)):
        error = step_error(x[j], s, o, inverse, zero, lowest, highest)
        moved = step_error(x[j], t, p, other, origin, lowest, highest)
        before += weight[j] * error * error
        after += weight[j] * moved * moved
    return before, after


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ORDER)
def exact_step_error(x, weight, s, o, lowest, highest):  # type: ignore[no-untyped-def]
    """As one of `rough_step_errors`, in float64, and rounded and decoded as `affine` does."""
    divisor, zero = (s, o) if s != 0 else (F32(np.inf), F32(0))
    total = 0.0
    for j in range(len(x)):
        level = min(max(np.rint((x[j] - zero) / divisor), lowest), highest)
        error = np.float64(level * s + o) - np.float64(x[j])
        total += np.float64(weight[j]) * error * error
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=NONE)
def cast_error(x, s, inverse, smallest, steps, highest):  # type: ignore[no-untyped-def]
    """What a size x lacks of its decoded level, computed as `minifloat` does."""
    return x - nearest_level(min(x * inverse, highest), smallest, steps) * s


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ORDER)
def rough_cast_errors(x, weight, s, t, smallest, steps, highest):  # type: ignore[no-untyped-def]
    """As `rough_step_errors`, on the levels of a `minifloat.Grid`, for scales s and t."""
    inverse, other = F32(1) / s if s != 0 else F32(0), F32(1) / t if t != 0 else F32(0)
    before, after = F32(0), F32(0)
    for j in range(len(x)):
        error = cast_error(abs(x[j]), s, inverse, smallest, steps, highest)
        moved = cast_error(abs(x[j]), t, other, smallest, steps, highest)
        before += weight[j] * error * error
        after += weight[j] * moved * moved
    return before, after


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ORDER)
def exact_cast_error(x, weight, s, smallest, mantissa, highest):  # type: ignore[no-untyped-def]
    """As one of `rough_cast_errors`, in float64, and rounded and decoded as `minifloat` does."""
    divisor = s if s != 0 else F32(np.inf)
    total = 0.0
    for j in range(len(x)):
        size = min(abs(x[j] / divisor), highest)
        power = power_of(size, smallest)
        step = np.int32(power - np.int32(mantissa << 23)).view(F32)
        level = np.rint(size * inverse_step(power, mantissa)) * step
        error = np.float64(level * s) - np.float64(abs(x[j]))
        total += np.float64(weight[j]) * error * error
    return total


class Levels(NamedTuple):
    """Levels that a group is rounded to.

    Attributes:
        floating: whether they are those of a `minifloat.Grid`, where offsets are 0; else consecutive integers.
        lowest, highest: the first one and the last one.
        smallest, mantissa: of a grid, see `minifloat.Grid.numbers`.
    """

    floating: bool
    lowest: np.float32
    highest: np.float32
    smallest: np.int32
    mantissa: np.int32


def steps(lowest: float, highest: float) -> Levels:
    """Consecutive integers; rounded to as in `affine.round_to_levels`."""
    return Levels(False, F32(lowest), F32(highest), np.int32(0), np.int32(0))


def casts(grid: Grid) -> Levels:
    """Those of a grid; rounded to as in `minifloat.nearest_levels`."""
    smallest, mantissa, highest = grid.numbers
    return Levels(True, -highest, highest, smallest, mantissa)


@njit(nogil=True, cache=True, error_model="numpy")
def rough_errors(x, weight, first, second, levels):  # type: ignore[no-untyped-def]
    """Weighted squared errors of a group x [C] with two pairs (scale, offset): sums in float32, added in float64."""
    before, after, steps = 0.0, 0.0, ROUNDER * F32(2.0**-levels.mantissa)
    for a in range(0, len(x), PART):
        v, m = x[a : a + PART], weight[a : a + PART]
        if levels.floating:
            e, f = rough_cast_errors(v, m, first[0], second[0], levels.smallest, steps, levels.highest)
        else:
            e, f = rough_step_errors(v, m, first, second, levels.lowest, levels.highest)
        before += e
        after += f
    return before, after


@njit(nogil=True, cache=True, error_model="numpy")
def exact_error(x, weight, s, o, levels):  # type: ignore[no-untyped-def]
    """Weighted squared error of a group x [C], in float64."""
    if levels.floating:
        return exact_cast_error(x, weight, s, levels.smallest, levels.mantissa, levels.highest)
    return exact_step_error(x, weight, s, o, levels.lowest, levels.highest)


@njit(nogil=True, cache=True, error_model="numpy")
def better_rows(w, first, second, levels, weight, better, start, stop):  # type: ignore[no-untyped-def]
    """Fills better, bool [N, S], for rows start to stop; first, second: (scale, offset), [N, G] each."""
    (s, o), (t, p) = first, second
    per, width = s.shape[1] // better.shape[1], w.shape[1] // s.shape[1]
    span = 2.0 ** (levels.mantissa + 1) if levels.floating else np.float64(levels.highest - levels.lowest)
    doubt = 2.0**-23 * (min(width, PART) + ROUNDINGS + AT_TIES * span)
    for n in range(start, stop):
        for b in range(better.shape[1]):
            a, c, alike = 0.0, 0.0, True
            for g in range(b * per, (b + 1) * per):
                x, m = w[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
                pair, other = (s[n, g], o[n, g]), (t[n, g], p[n, g])
                alike &= pair == other
                e, f = rough_errors(x, m, pair, other, levels)
                a += e
                c += f
            better[n, b] = c < a and not alike
            if alike or (abs(c - a) > doubt * (a + c) and a + c > LEAST):
                continue
            before, after = 0.0, 0.0
            for g in range(b * per, (b + 1) * per):
                x, m = w[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
                before += exact_error(x, m, s[n, g], o[n, g], levels)
                after += exact_error(x, m, t[n, g], p[n, g], levels)
            better[n, b] = after < before * (1 - TIE)


def better_blocks(
    w: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    levels: Levels,
    weight: Tensor,
    blocks: int,
) -> Tensor:
    """Where a second choice is better.

    Args:
        w: float32 [N, C].
        first: (scale, offset), float32 [N, G] each.
        second: the same.
        levels: what is rounded to.
        weight: float32 [C], of a squared error.
        blocks: S.

    Returns:
        bool [N, S].
    """
    if w.is_cuda:
        from qtool.numerics.grids import cuda_affine

        rule = 1 - TIE, float(ROUNDER * F32(2.0**-levels.mantissa))
        return cuda_affine.better_blocks(w, first, second, levels, weight, blocks, rule)
    found = np.empty((len(w), blocks), np.bool_)
    x, m = (t.contiguous().cpu().numpy() for t in (w, weight))
    pairs = [tuple(p.contiguous().cpu().numpy() for p in pair) for pair in (first, second)]
    over_rows(lambda a, b: better_rows(x, *pairs, levels, m, found, a, b), len(w))
    return torch.from_numpy(found).to(w.device)


def better(second: Tensor, first: Tensor) -> Tensor:
    """Where errors of a second choice are smaller than those of the first by more than `TIE`; float64 -> bool."""
    return second < first * (1 - TIE)
