"""The column walk where scales of integers are searched when it gets there, as a compiled kernel over rows.

`walk` with `search.symmetric` or `search.zero_point` as its parameters gives the same, but where the last bit of a sum
decides, and takes half as long again: here a group is searched and walked in one go, some rows at a time, which stay in
the cache meanwhile.

Shape letters: N rows, K columns, G groups, W columns of a group, P rows walked together.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import LARGEST, refuse_large
from qtool.numerics.grids.scale_codes import EXACT
from qtool.numerics.scales.search import IntegerScales, clip_ratios, magnitude, symmetric_rows, zero_point_rows
from qtool.numerics.solving.coded_walk import BLOCK, LANES, feed
from qtool.numerics.threads.parallel import over_rows

F32, I32 = np.float32, np.int32
STORED = {torch.float32: False, torch.bfloat16: True}
"""Types of scales, and whether they are the upper half of a float32."""


def walks(rule: IntegerScales) -> bool:
    """Whether scales of that kind are searched here."""
    return rule.dtype in STORED


@njit(nogil=True, cache=True, inline="always")
def upper_half(x):  # type: ignore[no-untyped-def]
    """A float32 rounded to bfloat16, ties to even."""
    bits = F32(x).view(I32)
    return I32((bits + I32(0x7FFF) + ((bits >> I32(16)) & I32(1))) & I32(-65536)).view(F32)


@njit(nogil=True, cache=True)
def search_group(w, places, weight, reach, rule, x, scale, zero):  # type: ignore[no-untyped-def]
    """Fills scale, as it is stored, and zero [P, 1] of a group w [W, P]; returns the bits of its largest size.

    For the others, see `walk_group_rows`; x [P, W] is memory. NaN is larger than all numbers.
    """
    ratios, lowest, highest, zeros, half = rule
    width, count = w.shape
    most = I32(0)
    for j in range(width):
        column, place = w[j], places[j]
        for n in range(count):
            most = max(most, magnitude(column[n]))
            x[n, place] = column[n]
    if zeros:
        zero_point_rows(x, weight, reach, width, lowest, highest, ratios, scale, zero, 0, count)
    else:
        symmetric_rows(x, weight, reach, width, lowest, highest, ratios, scale, 0, count)
    for n in range(count):
        s = upper_half(scale[n, 0]) if half else scale[n, 0]
        scale[n, 0] = s if s != 0 else F32(1)
    return most


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def round_column(x, scale, offset, inverse, lowest, highest, code, error):  # type: ignore[no-untyped-def]
    """Fills code and error [P] of a column x [P]; inverse: of U_jj. See `walk.walk_rows`."""
    for n in range(len(x)):
        level = min(max(np.rint((x[n] - offset[n]) / scale[n]), lowest), highest)
        code[n] = np.uint8(level - lowest)
        error[n] = (x[n] - (scale[n] * level + offset[n])) * inverse


@njit(nogil=True, cache=True, error_model="numpy")
def walk_group_rows(w, columns, places, weight, reach, rule, codes, error, scales, zeros, most, start, stop):  # type: ignore[no-untyped-def]
    """Walks the columns of a group w [W, N] for rows start to stop.

    columns [W, W]: the group's block of the inverse factor, transposed; places [W]: where a column stands in the group
    when nothing is reordered, as weight and reach [W] do; rule: (ratios, lowest, highest, whether there are zero
    points, whether scales are bfloat16). Fills codes uint8 and error [W, N], scales and zeros [N], and most int32 [N]
    with the bits of the largest size around a row.
    """
    width, lowest, highest = len(w), F32(rule[1]), F32(rule[2])
    tile, e, code = np.zeros((width, LANES), F32), np.empty((width, LANES), F32), np.empty((width, LANES), np.uint8)
    x, s, o = np.empty((LANES, width), F32), np.empty(LANES, F32), np.empty(LANES, F32)
    scale, zero = np.empty((LANES, 1), F32), np.zeros((LANES, 1), F32)
    for first in range(start, stop, LANES):
        count = min(LANES, stop - first)
        rows = slice(first, first + count)
        tile[:, :count] = w[:, rows]  # side by side, which only whole rows of an array are known to be
        most[rows] = search_group(tile, places, weight, reach, rule, x, scale, zero)
        for n in range(LANES):
            s[n], o[n] = scale[n, 0], -scale[n, 0] * zero[n, 0]
        for j in range(width):
            feed(e[:j], columns[j, :j], tile[j])
            round_column(tile[j], s, o, F32(1) / columns[j, j], lowest, highest, code[j], e[j])
        scales[rows], zeros[rows] = s[:count], zero[:count, 0]
        codes[:, rows], error[:, rows] = code[:, :count], e[:, :count]


def walk_integers(
    w: Tensor, factor: Tensor, rule: IntegerScales, places: Tensor, weight: Tensor, reach: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GPTQ's walk where the scale of each group of integers is searched when the walk gets there.

    Args:
        w: float32 [N, K], columns in walking order, those of a group side by side.
        factor: float32 [K, K], U of `linalg.inverse_factor`, in the same order.
        rule: how scales are chosen; see `walks`.
        places: int64 [K], where a column stands in its group when nothing is reordered.
        weight: float32 [K], see `search.relative`, of groups in walking order and their columns as `places` has them.
        reach: float32 [K], of them.

    Returns:
        Codes, uint8 [N, K], in walking order; scales and, if there are any, zero points, float32 [N, G] each.

    Raises:
        NumericsError: weights that are not finite, or too large to be searched.
    """
    rest, width = w.T.contiguous(), rule.columns
    (k, rows), size = rest.shape, max(1, BLOCK // width) * width
    codes, errors = torch.empty(k, rows, dtype=torch.uint8), torch.empty(size, rows)
    found, most = torch.empty(2, k // width, rows), np.zeros(rows, np.int32)
    ratios = clip_ratios(rule.highest - rule.lowest + 1)
    how = ratios, rule.lowest, rule.highest, rule.zeros, STORED[rule.dtype]
    where, counts, reaches = places.numpy(), weight.numpy(), reach.numpy()
    for first in range(0, k, size):
        last = min(first + size, k)
        for a in range(first, last, width):
            b, g, error = a + width, a // width, errors[a - first : a + width - first]
            columns = factor[a:b, a:b].T.contiguous().numpy()
            given = rest[a:b].numpy(), columns, where[a:b], counts[a:b], reaches[a:b], how
            filled = codes[a:b].numpy(), error.numpy(), found[0, g].numpy(), found[1, g].numpy(), most
            over_rows(partial(walk_group_rows, *given, *filled), rows)
            largest = np.int32(most.max(initial=0)).view(np.float32)
            if not largest <= LARGEST:
                refuse_large(float(largest), LARGEST)
            rest[b:last].addmm_(factor[a:b, b:last].T, error, alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].T, errors[: last - first], alpha=-1)
    return codes.T, tuple(p.T for p in found[: 1 + rule.zeros])
