"""Scales that are stored as codes, such as small floats: the code with the least weighted squared error of a few.

Groups lie side by side in vector registers, so that short ones leave no lane idle. For levels l that a group's x / s is
rounded to, s^2 * sum_j importance_j l_j (2 x_j / s - l_j) is what its error falls short of that of zeros.

Shape letters: N rows, C columns, G groups of a row, W columns of a group, E ends, P groups that are searched at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.grids.compare import ROUNDINGS, TIE, exact_cast_error
from qtool.numerics.grids.minifloat import EXPONENT, ROUNDER, Grid
from qtool.numerics.scales.search import relative
from qtool.numerics.threads.parallel import over_rows

F32, I32 = np.float32, np.int32
LANES = 64
"""Groups that are searched at once, if there are so many: what they need stays in the fastest cache."""
LARGEST = 2.0**126
"""The largest weight whose scale is searched: what a larger scale makes of it, up to three times as much, is finite."""
EXACT = {"nnan", "nsz", "contract"}
"""Freedoms of the compiler that leave sums with `ROUNDER` as they are."""


class CodedScales(NamedTuple):
    """How the scales of groups are chosen among numbers that have codes.

    Attributes:
        values: float32 [codes], ascending; the first is never taken for a group that is not all zero.
        columns: W.
        tried: the first and the last code that are tried, relative to those of a group's ends.
        grid: levels to round to.
        unit: codes are E4M3 numbers that count in it.
        powers: codes are exponents of two instead.
        empty: the code of a group of zeros.
    """

    values: Tensor
    columns: int
    tried: tuple[int, int]
    grid: Grid
    unit: float
    powers: bool
    empty: int


@njit(nogil=True, cache=True, fastmath=EXACT)
def gains(x, weight, at, inverse, smallest, steps, highest, gain):  # type: ignore[no-untyped-def]
    """Fills gain [P], in units of the squared scales whose inverses are given.

    x [W, P or more], magnitudes; weight [W, .] from column `at` on. steps: `ROUNDER` times the step between 1 and 2.
    """
    gain[:] = F32(0)
    for j in range(len(x)):
        v, w = x[j, : len(gain)], weight[j, at : at + len(gain)]
        for g in range(len(gain)):
            size = v[g] * inverse[g]
            clipped = min(size, highest)
            rounder = I32(max(I32(F32(clipped).view(I32) & EXPONENT), smallest)).view(F32) * steps
            level = (clipped + rounder) - rounder
            gain[g] += w[g] * level * (size + size - level)


@njit(nogil=True, cache=True, error_model="numpy")
def try_codes(end, step, values, unit, code, inverse, square):  # type: ignore[no-untyped-def]
    """Fills code [P] with those that lie `step` from some ends, and the inverses and squares of their scales."""
    last = I32(len(values) - 1)
    for g in range(len(code)):
        code[g] = min(max(end[g] + step, I32(1)), last)
        value = values[code[g]]
        inverse[g] = F32(1) / value
        ratio = value / unit[g]  # squares of small scales would be zero
        square[g] = ratio * ratio


@njit(nogil=True, cache=True)
def keep_better(gain, square, code, best, second, chosen):  # type: ignore[no-untyped-def]
    """Updates best and chosen [P] where a code gains more, and second [P], what the best of all others gains."""
    for g in range(len(gain)):
        more = gain[g] * square[g]
        better = more > best[g]
        other = best[g] if better else more if code[g] != chosen[g] else second[g]
        second[g] = max(second[g], other)
        best[g] = more if better else best[g]
        chosen[g] = code[g] if better else chosen[g]


@njit(nogil=True, cache=True)
def exact_code(x, weight, ends, values, tried, smallest, mantissa, highest):  # type: ignore[no-untyped-def]
    """The code with the least error for a group [W] of those tried around its ends [E]; the first one in a tie."""
    least, found = np.inf, I32(1)
    for e in range(len(ends) - 1, -1, -1):
        for step in range(tried[0], tried[1] + 1):
            code = min(max(I32(ends[e]) + I32(step), I32(1)), I32(len(values) - 1))
            error = exact_cast_error(x, weight, values[code], smallest, mantissa, highest)
            if error < least * (1 - TIE):
                least, found = error, code
    return found


@njit(nogil=True, cache=True)
def code_rows(x, weight, ends, values, powers, tried, numbers, steps, found, start, stop):  # type: ignore[no-untyped-def]
    """Fills found uint8 [N * G] for some groups: x [N * G, W], weight [W, rows * G], ends [N * G, E].

    Codes whose gains differ by no more than sums in float32 may be off are compared exactly. Where values are powers of
    two, equal gains are no doubt: their sums are the same operations on multiples.
    """
    (smallest, mantissa, highest), doubt = numbers, F32(2**-22) * F32(x.shape[1] + ROUNDINGS)
    width, period, last = x.shape[1], weight.shape[1], len(values) - 1
    side, floats, codes = np.empty((width, LANES), F32), np.empty((6, LANES), F32), np.empty((3, LANES), I32)
    first = start
    while first < stop:
        at = first % period
        count = min(LANES, period - at, stop - first)
        gain, best, second, inverse = floats[0, :count], floats[1, :count], floats[2, :count], floats[3, :count]
        square, unit, end = floats[4, :count], floats[5, :count], codes[0, :count]
        code, chosen = codes[1, :count], codes[2, :count]
        for g in range(count):
            best[g], second[g], chosen[g] = F32(-1), F32(-1), I32(0)
            unit[g] = values[min(max(ends[first + g, 0], 1), last)]
            for j in range(width):
                side[j, g] = abs(x[first + g, j])
        for e in range(ends.shape[1] - 1, -1, -1):  # from the smaller end on
            for g in range(count):
                end[g] = I32(ends[first + g, e])
            for step in range(tried[0], tried[1] + 1):
                try_codes(end, I32(step), values, unit, code, inverse, square)
                gains(side, weight, at, inverse, smallest, steps, highest, gain)
                keep_better(gain, square, code, best, second, chosen)
        for g in range(count):
            n, gap = first + g, best[g] - second[g]
            if gap <= doubt * best[g] and not (powers and gap == 0):
                chosen[g] = exact_code(x[n], weight[:, at + g], ends[n], values, tried, smallest, mantissa, highest)
            found[n] = max(chosen[g], I32(1))
        first += count


def best_code(
    x: Tensor, importance: Tensor | None, ends: Tensor, values: Tensor, tried: tuple[int, int], grid: Grid
) -> Tensor:
    """The code of the scale with the least weighted squared error, of those around some.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        ends: uint8 [N, G, 1 or 2], descending: codes to look around.
        values: float32 [codes], scales, ascending; the first is never taken.
        tried: the first and the last code that are tried, relative to each end.
        grid: levels to round to.

    Returns:
        uint8 [N, G].
    """
    (n, groups, _), width = ends.shape, x.shape[1] // ends.shape[1]
    smallest, mantissa, highest = grid.numbers
    step = ROUNDER * F32(2.0**-mantissa)
    if x.is_cuda:
        from qtool.numerics.scales import cuda_search

        numbers = int(smallest), float(step), float(highest)
        return cuda_search.best_code(x, relative(importance, x.shape[1], groups), ends, values, tried, numbers)
    weight = relative(importance, x.shape[1], groups).cpu()
    weights = np.tile(weight.numpy().reshape(groups, width), (-(-LANES // groups), 1)).T.copy()
    weighed = x.float().contiguous().cpu().numpy().reshape(-1, width)
    found = np.empty(n * groups, np.uint8)
    powers = bool((values[1:-1].frexp().mantissa == 0.5).all())
    rule = powers, tried, grid.numbers, step
    arrays = (
        weighed.reshape(-1, width),
        weights,
        ends.reshape(n * groups, -1).contiguous().cpu().numpy(),
        values.numpy(),
    )
    over_rows(lambda a, b: code_rows(*arrays, *rule, found, a * groups, b * groups), n)
    return torch.from_numpy(found).view(n, groups).to(x.device)
