"""ggml's searches for the scales of IQ1_S and IQ1_M, repeated to the last bit; see `ggml.search`.

These are `quantize_row_iq1_s_impl` and `quantize_row_iq1_m_impl` of ggml-quants.c
(https://github.com/ggml-org/llama.cpp). Weights of a group in order of size are split in all ways into the three
levels, with every choice of shifts; then each vector goes to an entry of the codebook.

Shape letters: N rows, K columns, S super-blocks of a row, G groups of a row, C columns of a group, H shifts of a group
(1 or 2), T their combinations (2 or 4).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.scale_rule import ScaleRule
from qtool.numerics.ggml.codebook import F32, SUPER, fill_steps, relative_error, search_rows, weigh
from qtool.numerics.ggml.shells import fill_closest, shells_of
from qtool.numerics.scales.sweep import half

VECTOR = 8
LOWEST = np.finfo(np.float32).min
SHELLS = 3
"""Of entries around what is no entry."""


class TernarySearch(NamedTuple):
    """What ggml does for one block type.

    Attributes:
        least: a group whose largest weight is below is taken for zeros.
        stretch: of the super-block's scale.
        refitted: that scale is fitted once more to all codes.
        required: ggml needs importances.
    """

    least: float
    stretch: float
    refitted: bool = False
    required: bool = False


@njit(nogil=True, cache=True, error_model="numpy")
def sort_columns(x, order):  # type: ignore[no-untyped-def]
    """Fills order [C] with the columns of x [C], ascending; equal ones stay in order."""
    for j in range(len(x)):
        at = j
        while at > 0 and x[order[at - 1]] > x[j]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = j


@njit(nogil=True, cache=True, error_model="numpy")
def fill_sums(x, weight, order, sums):  # type: ignore[no-untyped-def]
    """Fills sums [2, H, C + 1] of weight * x and of weight over the first columns in order, for each shift."""
    part = len(x) // sums.shape[1]
    sums[:, :, 0] = F32(0)
    for j in range(len(x)):
        column = order[j]
        for h in range(sums.shape[1]):
            sums[0, h, j + 1], sums[1, h, j + 1] = sums[0, h, j], sums[1, h, j]
        h = column // part
        sums[0, h, j + 1] += weight[column] * x[column]
        sums[1, h, j + 1] += weight[column]


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def one_shift(sums, shift, a, b):  # type: ignore[no-untyped-def]
    """(sum of weight * x * level, sum of weight * level^2) with the first level up to column a, the second up to b."""
    wx, w, end = sums[0, 0], sums[1, 0], sums.shape[2] - 1
    low, middle, high = shift - F32(1), shift, shift + F32(1)
    xl = wx[a] * low + (wx[b] - wx[a]) * middle + (wx[end] - wx[b]) * high
    return xl, w[a] * low * low + (w[b] - w[a]) * middle * middle + (w[end] - w[b]) * high * high


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def one_of_two_shifts(sums, h, shift, a, b):  # type: ignore[no-untyped-def]
    """As `one_shift`, for the half of a group that has shift h, where ggml adds up in another way."""
    wx, w, end = sums[0, h], sums[1, h], sums.shape[2] - 1
    low, middle, high = shift - F32(1), shift, shift + F32(1)
    first, second = low * low - middle * middle, middle * middle - high * high
    return wx[end] * high - (wx[a] + wx[b]), w[end] * high * high + w[a] * first + w[b] * second


@njit(nogil=True, cache=True, error_model="numpy")
def best_split(sums, delta):  # type: ignore[no-untyped-def]
    """(scale, columns of the first level, of the first two, combination of shifts; this is -1 if no split will do).

    The highest bit of a combination is of the first shift, and set where that is -delta.
    """
    scale, first, second, chosen, best = F32(0), 0, 0, -1, F32(LOWEST)
    two = sums.shape[1] == 2
    for a in range(sums.shape[2]):
        for b in range(a, sums.shape[2]):
            if two:
                up, down = one_of_two_shifts(sums, 0, delta, a, b), one_of_two_shifts(sums, 0, -delta, a, b)
                right_up, right_down = one_of_two_shifts(sums, 1, delta, a, b), one_of_two_shifts(sums, 1, -delta, a, b)
            else:
                up, down = one_shift(sums, delta, a, b), one_shift(sums, -delta, a, b)
                right_up, right_down = up, down
            for t in range(4 if two else 2):
                xl, ll = down if t >> two else up
                if two:
                    right = right_down if t & 1 else right_up
                    xl, ll = xl + right[0], ll + right[1]
                if ll > 0 and xl * xl > best * ll:
                    scale, first, second, chosen = xl / ll, a, b, t
                    best = scale * xl
    return scale, first, second, chosen


@njit(nogil=True, cache=True, error_model="numpy")
def group_scale(x, weight, kind, delta, shells, levels, memory):  # type: ignore[no-untyped-def]
    """(scale, combination of shifts) of a group [C]; fills levels [C], shifted ones."""
    (order, number, sums, total), (base, _, begin, numbers) = memory, shells
    levels[:], shifts = delta - F32(1), sums.shape[1]
    if max(x.max(), -x.min()) < F32(kind.least):
        return F32(0), 0
    sort_columns(x, order)
    fill_sums(x, weight, order, sums)
    scale, first, second, chosen = best_split(sums, delta)
    if chosen < 0:
        return F32(0), 0
    for j in range(len(x)):
        number[order[j]] = (j >= first) + (j >= second)
    if scale < 0:
        scale, chosen, number[:] = -scale, (1 << shifts) - 1 - chosen, 2 - number
    away = False
    for at in range(0, len(x), VECTOR):
        bit = shifts - 1 - at * shifts // len(x)
        start = (-delta if chosen >> bit & 1 else delta) - F32(1)
        away |= fill_closest(x, weight, at, VECTOR, scale, F32(1), start, base, begin, numbers, number, total)
        for j in range(at, at + VECTOR):
            levels[j] = F32(number[j]) + start
    if away:
        xl, ll = products(x, weight, levels)
        scale = xl / ll if xl > 0 and ll > 0 else scale
    return scale, chosen


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def products(x, weight, levels):  # type: ignore[no-untyped-def]
    """(sum of weight x level x, sum of weight level^2)."""
    xl, ll = F32(0), F32(0)
    for j in range(len(x)):
        xl += weight[j] * levels[j] * x[j]
        ll += weight[j] * levels[j] * levels[j]
    return xl, ll


@njit(nogil=True, cache=True, error_model="numpy")
def ternary_rows(x, importance, weights, kind, rule, shells, d, s, minus, errors, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, errors [N, S], s [N, G] and minus [N, G H] for rows start to stop; see `ggml_ternary_scales`."""
    per, group, shifts, delta = s.shape[1] // d.shape[1], rule.group, rule.group // rule.segment, F32(rule.delta)
    weight, levels, stepped = np.empty((3, SUPER), F32)
    sums, total = np.empty((2, shifts, group + 1), F32), np.empty(shells.most, F32)
    memory, scale = (np.empty(group, np.int64), np.empty(group, np.int32), sums, total), np.empty(per, F32)
    for n in range(start, stop):
        for b in range(d.shape[1]):
            here, steps = slice(b * SUPER, (b + 1) * SUPER), s[n, b * per : (b + 1) * per]
            row = x[n, here]
            weigh(row, importance[here], 2.0, 0.0, weight)
            for g in range(per):
                part = slice(g * group, (g + 1) * group)
                scale[g], chosen = group_scale(row[part], weight[part], kind, delta, shells, levels[part], memory)
                for h in range(shifts):
                    minus[n, (b * per + g) * shifts + h] = chosen >> (shifts - 1 - h) & 1
            step = scale.max() / F32(2 * rule.top + 1)
            fill_steps(scale, step, rule.top, steps)
            if kind.refitted and step > 0:
                for j in range(SUPER):
                    stepped[j] = levels[j] * (2 * steps[j // group] + 1)
                xl, ll = products(row, weight, stepped)
                step = xl / ll if ll > 0 else step
            d[n, b] = step * F32(kind.stretch)
            errors[n, b] = relative_error(row, levels, half(d[n, b]) * F32(rule.unit), steps, weights[here])


def ggml_ternary_scales(
    x: Tensor, importance: Tensor | None, weight: Tensor, book: Codebook, rule: ScaleRule, kind: TernarySearch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ggml takes.

    Args:
        x: float32 [N, K].
        importance: float32 [K] or None.
        weight: float32 [K], of a squared error.
        book: of the block type.
        rule: how it stores scales.
        kind: what ggml does for it.

    Returns:
        (d, float32 [N, S], not yet in fp16; s, float32 [N, G] of integers; which shifts are down, uint8 [N, G H]; the
        error of ggml's own codes in parts of that of zeros, float32 [N, S], infinite where that is 0).
    """
    fixed, shifts = (kind, rule, shells_of(book, SHELLS)), x.shape[1] // rule.segment
    return search_rows(
        lambda arrays, found, a, b: ternary_rows(*arrays, *fixed, *found, a, b), x, importance, weight, rule, shifts
    )
