"""The column walk where scales are codes that are searched when it gets there, as a compiled kernel over rows.

`walk` with `scale_codes.best_code` as its parameters does the same group by group. Here rows lie side by side through
search and walk of a block, whose columns stay in the cache meanwhile, and levels are computed instead of looked up:
ties go to the even multiple of a step, as where a format rounds.

Shape letters: N rows, K columns, B columns of a block, G groups, W columns of a group, P rows walked together.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import refuse_large
from qtool.numerics.grids.compare import ROUNDINGS
from qtool.numerics.grids.minifloat import EXPONENT, ROUNDER, SIZE, inverse_step, positive_levels, power_of
from qtool.numerics.grids.scale_codes import EXACT, LARGEST, CodedScales, exact_code, keep_better, try_codes
from qtool.numerics.threads.parallel import over_rows

F32, I32 = np.float32, np.int32
BLOCK = 128
"""Most columns of a block, unless a group is longer."""
LANES = 64
"""P: their part of a block stays in the fastest cache."""
E4M3 = (I32(121 << 23), F32(1.5 * 2**20), F32(448))
"""Bits of the power of two from which on the steps of E4M3 grow, what rounds to an eighth, and the largest number."""


class CodeRule(NamedTuple):
    """`CodedScales` as kernels see them.

    Attributes:
        values, unit, powers, empty: see there.
        low, high: the first and the last code that are tried, relative to those of a group's ends.
        smallest, mantissa, highest: see `minifloat.Grid.numbers`.
        exponent: of the largest level.
        center: the index of zero among the levels.
    """

    values: np.ndarray
    unit: np.float32
    powers: bool
    empty: int
    low: int
    high: int
    smallest: np.int32
    mantissa: np.int32
    highest: np.float32
    exponent: int
    center: np.int32


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def end_codes(size, rule, code):  # type: ignore[no-untyped-def]
    """Fills code [P] with that of the scale that just covers a size [P]."""
    smallest, eighth, most = E4M3
    for n in range(len(code)):
        if rule.powers:
            code[n] = (F32(size[n]).view(I32) >> 23) - rule.exponent
        else:
            x = min(size[n] / rule.highest / rule.unit, most)
            rounder = I32(max(I32(F32(x).view(I32) & EXPONENT), smallest)).view(F32) * eighth
            whole = (x + rounder) - rounder
            bits = I32(F32(whole).view(I32) >> 20) - I32(120 << 3)
            code[n] = I32(whole * F32(512)) if whole < F32(2**-6) else bits
        code[n] = min(max(code[n], I32(0)), I32(len(rule.values) - 1))


@njit(nogil=True, cache=True, fastmath=EXACT)
def gains(x, weight, inverse, smallest, steps, highest, gain):  # type: ignore[no-untyped-def]
    """`scale_codes.gains` where all groups have the same weights [W]; x [W, P], magnitudes."""
    gain[:] = F32(0)
    for j in range(len(x)):
        v, w = x[j], weight[j]
        for n in range(len(gain)):
            size = v[n] * inverse[n]
            clipped = min(size, highest)
            rounder = I32(max(I32(F32(clipped).view(I32) & EXPONENT), smallest)).view(F32) * steps
            level = (clipped + rounder) - rounder
            gain[n] += w * level * (size + size - level)


@njit(nogil=True, cache=True, fastmath=EXACT)
def fill_sizes(w, reach, side, bits, far, near):  # type: ignore[no-untyped-def]
    """Fills side [W, P] with magnitudes of w [W, P], far and near [P] with the largest of them and times reach [W].

    bits [P] are those of far: integers, among which NaN is larger than all numbers.
    """
    bits[:], near[:] = I32(0), F32(0)
    for j in range(len(w)):
        v, s, r = w[j], side[j], reach[j]
        for n in range(len(far)):
            s[n] = abs(v[n])
            bits[n], near[n] = max(bits[n], F32(v[n]).view(I32) & SIZE), max(near[n], s[n] * r)
    for n in range(len(far)):
        far[n] = I32(bits[n]).view(F32)


@njit(nogil=True, cache=True)
def search_group(w, weight, reach, rule, side, floats, codes):  # type: ignore[no-untyped-def]
    """The codes [P] of the best scales of a group w [W, P], and the bits of the largest size; see `code_rows`.

    weight, reach [W]; side [W, P], floats [8, P] and codes [4, P] are memory.
    """
    far, near, gain, best, second, inverse = floats[0], floats[1], floats[2], floats[3], floats[4], floats[5]
    square, unit, code, chosen = floats[6], floats[7], codes[2], codes[3]
    last, steps = len(rule.values) - 1, ROUNDER * F32(2.0**-rule.mantissa)
    doubt = F32(2**-22) * F32(len(w) + ROUNDINGS)
    fill_sizes(w, reach, side, code, far, near)
    largest = code.max()
    end_codes(far, rule, codes[1])
    end_codes(near, rule, codes[0])
    for n in range(len(far)):
        best[n], second[n], chosen[n] = F32(-1), F32(-1), I32(0)
        unit[n] = rule.values[min(max(codes[1, n], 1), last)]
    farther = (codes[1] - codes[0]).max()
    for end in range(2):
        for step in range(rule.low, rule.high + 1):
            if end == 1 and step + farther <= rule.high:  # tried from the other end
                continue
            try_codes(codes[end], I32(step), rule.values, unit, code, inverse, square)
            gains(side, weight, inverse, rule.smallest, steps, rule.highest, gain)
            keep_better(gain, square, code, best, second, chosen)
    ends, group, numbers = np.empty(2, I32), np.empty(len(w), F32), (rule.smallest, rule.mantissa, rule.highest)
    for n in range(len(far)):
        gap = best[n] - second[n]
        if gap <= doubt * best[n] and not (rule.powers and gap == 0):
            ends[0], ends[1], group[:] = codes[1, n], codes[0, n], side[:, n]
            chosen[n] = exact_code(group, weight, ends, rule.values, (rule.low, rule.high), *numbers)
        chosen[n] = max(chosen[n], I32(1)) if far[n] > 0 else rule.empty
    return chosen, largest


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def round_column(x, s, inverse, rule, code, error):  # type: ignore[no-untyped-def]
    """Fills code and error [P] of a column x [P] at scales s [P]; inverse: of U_jj."""
    shift = np.uint32(np.uint32(23 - rule.mantissa) & np.uint32(31))
    for n in range(len(x)):
        y = x[n] / s[n]
        size = min(abs(y), rule.highest)
        power = power_of(size, rule.smallest)
        steps = F32(np.rint(size * inverse_step(power, rule.mantissa)))
        level = steps * I32(power - I32(rule.mantissa << 23)).view(F32)
        index = I32(I32(np.uint32(power - rule.smallest) >> shift) + I32(steps))
        code[n] = np.uint8(rule.center - index) if y < 0 else np.uint8(rule.center + index)
        error[n] = (x[n] - s[n] * (-level if y < 0 else level)) * inverse


@njit(nogil=True, cache=True, fastmath=EXACT)
def feed(error, factor, later):  # type: ignore[no-untyped-def]
    """later [P] -= error [., P] times factor [.], in order, four at a time."""
    whole = len(error) // 4 * 4
    for j in range(0, whole, 4):
        a, b, c, d = error[j], error[j + 1], error[j + 2], error[j + 3]
        p, q, r, t = factor[j], factor[j + 1], factor[j + 2], factor[j + 3]
        for n in range(len(later)):
            later[n] = (((later[n] - a[n] * p) - b[n] * q) - c[n] * r) - d[n] * t
    for j in range(whole, len(error)):
        a, p = error[j], factor[j]
        for n in range(len(later)):
            later[n] -= a[n] * p


@njit(nogil=True, cache=True, error_model="numpy")
def walk_coded_rows(w, columns, weight, reach, rule, codes, error, found, most, start, stop):  # type: ignore[no-untyped-def]
    """Walks the B columns of a block for rows start to stop.

    w [B, N]; columns [B, B]: the block of the inverse factor, transposed; weight, reach [B]. Fills codes uint8 and
    error [B, N], found uint8 [groups, N], and most int32 [N] with the bits of the largest size around a row.
    """
    width = len(w) // len(found)
    tile, e, code = np.zeros((len(w), LANES), F32), np.empty((len(w), LANES), F32), np.empty((len(w), LANES), np.uint8)
    side, floats, s = np.empty((width, LANES), F32), np.empty((8, LANES), F32), np.empty(LANES, F32)
    integers = np.empty((4, LANES), I32)
    for first in range(start, stop, LANES):
        count = min(LANES, stop - first)
        rows, largest = slice(first, first + count), I32(0)
        tile[:, :count] = w[:, rows]  # side by side, which only whole rows of an array are known to be
        for g in range(len(found)):
            a, b = g * width, (g + 1) * width
            chosen, size = search_group(tile[a:b], weight[a:b], reach[a:b], rule, side, floats, integers)
            largest = max(largest, size)
            for n in range(LANES):
                s[n] = rule.values[chosen[n]]
            for n in range(count):
                found[g, first + n] = chosen[n]
            for j in range(a, b):
                feed(e[a:j], columns[j, a:j], tile[j])
                round_column(tile[j], s, F32(1) / columns[j, j], rule, code[j], e[j])
            for j in range(b, len(w)):
                feed(e[a:b], columns[j, a:b], tile[j])
        codes[:, rows], error[:, rows], most[rows] = code[:, :count], e[:, :count], largest


def walk_coded(w: Tensor, factor: Tensor, rule: CodedScales, weight: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ's walk where the scale of each group is a code that is searched when the walk gets there.

    Args:
        w: float32 [N, K], columns in walking order, those of a group side by side.
        factor: float32 [K, K], U of `linalg.inverse_factor`, in the same order.
        rule: how scales are chosen.
        weight: float32 [K], see `search.relative`, in the same order.
        reach: float32 [K], of them.

    Returns:
        Codes, uint8 [N, K], in walking order, and codes of scales, uint8 [N, G].

    Raises:
        NumericsError: weights that are not finite, or too large to be searched.
    """
    rest, width, grid = w.T.contiguous(), rule.columns, rule.grid
    (k, rows), size = rest.shape, max(1, BLOCK // rule.columns) * rule.columns
    codes, found = torch.empty(k, rows, dtype=torch.uint8), torch.empty(k // width, rows, dtype=torch.uint8)
    errors, most = torch.empty(size, rows), np.zeros(rows, np.int32)
    scales = rule.values.numpy(), F32(rule.unit), rule.powers, rule.empty, *rule.tried
    search = CodeRule(*scales, *grid.numbers, grid.exponent, I32(len(positive_levels(grid))))
    counts, reaches = weight.numpy(), reach.numpy()
    for a in range(0, k, size):
        b = min(a + size, k)
        columns = factor[a:b, a:b].T.contiguous().numpy()
        given = rest[a:b].numpy(), columns, counts[a:b], reaches[a:b], search
        filled = codes[a:b].numpy(), errors[: b - a].numpy(), found[a // width : b // width].numpy(), most
        over_rows(partial(walk_coded_rows, *given, *filled), rows)
        largest = np.int32(most.max(initial=0)).view(np.float32)
        if not largest <= LARGEST:
            refuse_large(float(largest), LARGEST)
        rest[b:].addmm_(factor[a:b, b:].T, errors[: b - a], alpha=-1)
    return codes.T, found.T
