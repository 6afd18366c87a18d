"""ggml's encoders that search with an importance matrix, repeated to the last bit: what ours must never fall behind.

These are `make_qkx3_quants`, `make_qp_quants` and `make_qx_quants` of ggml-quants.c and what calls them
(https://github.com/ggml-org/llama.cpp), in float32, every sum in ggml's order and no operations contracted. All groups
of a row lie side by side, so that they fill vector registers: column c of group g is x[c, g].

Shape letters: N rows, K columns, C columns of a group, G groups of a row, S super-blocks of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.parallel import over_rows

F32 = np.float32
FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}
EPSILON = F32(1e-15)
"""Below this ggml takes a group for zeros."""
NEAREST_FIRST = (0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)
"""Tenths of a level by which the signed search lets the largest value land beyond the lowest level."""
EVERY_TENTH = (0, -4, -3, -2, -1, 1, 2, 3, 4)
"""Likewise for steps of scales that are not negative."""


class Kind(NamedTuple):
    """What ggml does for one block type.

    Attributes:
        width: columns of a group.
        levels: the largest level; with signs, minus the lowest one.
        top: likewise of the integers that stand for scales; 0: there are none, every group has a scale of its own.
        minima: whether groups have them; without, levels are signed.
        spread: an error counts importance * sqrt(spread * mean(x^2) + x^2); -1: importance alone.
    """

    width: int
    levels: np.float32
    top: np.float32
    minima: bool
    spread: np.float32


@njit(nogil=True, cache=True, error_model="numpy")
def signed_scales(x, weight, levels, scale, inverse, work):  # type: ignore[no-untyped-def]
    """Fills scale [G], x [C, G] ~ scale * l, l in [-levels, levels - 1], and inverse [G] of the steps that gave l.

    weight [C, G]; work [5, G] is memory.
    """
    extreme, best, step, xl, ll = work[0], work[1], work[2], work[3], work[4]
    extreme[:], scale[:], inverse[:], best[:] = F32(0), F32(0), F32(0), F32(0)
    for c in range(len(x)):
        for g in range(len(scale)):
            extreme[g] = x[c, g] if abs(x[c, g]) > abs(extreme[g]) else extreme[g]
    for tenth in NEAREST_FIRST:
        for g in range(len(scale)):
            step[g] = -(levels + F32(0.1) * F32(tenth)) / extreme[g] if abs(extreme[g]) >= EPSILON else F32(0)
        xl[:], ll[:] = F32(0), F32(0)
        for c in range(len(x)):
            for g in range(len(scale)):
                level = np.rint(step[g] * x[c, g])
                level = level if level > -levels else -levels
                level = level if level < levels - F32(1) else levels - F32(1)
                xl[g] += weight[c, g] * x[c, g] * level
                ll[g] += weight[c, g] * level * level
        for g in range(len(scale)):
            if tenth == 0 or (ll[g] > 0 and xl[g] * xl[g] > best[g] * ll[g]):
                scale[g] = xl[g] / ll[g] if ll[g] != 0 else F32(0)
                best[g], inverse[g] = scale[g] * xl[g], step[g]


@njit(nogil=True, cache=True, error_model="numpy")
def shifted_start(x, weight, levels, scale, work):  # type: ignore[no-untyped-def]
    """The first part of `shifted_scales`: fills the first rows of its memory, and scale, from each group's range."""
    low, high, total, mean, inverse, best = work[0], work[1], work[2], work[3], work[4], work[5]
    low[:], high[:], total[:], mean[:], best[:] = x[0], x[0], F32(0), F32(0), F32(0)
    for c in range(len(x)):
        for g in range(len(scale)):
            low[g] = x[c, g] if x[c, g] < low[g] else low[g]
            high[g] = x[c, g] if x[c, g] > high[g] else high[g]
            total[g] += weight[c, g]
            mean[g] += weight[c, g] * x[c, g]
    for g in range(len(scale)):
        low[g] = low[g] if low[g] < 0 else F32(0)
        inverse[g] = levels / (high[g] - low[g])
        scale[g] = F32(1) / inverse[g] if high[g] > low[g] else F32(0)
    for c in range(len(x)):
        for g in range(len(scale)):
            level = np.rint(inverse[g] * (x[c, g] - low[g]))
            level = level if level < levels else levels
            error = scale[g] * level + low[g] - x[c, g]
            best[g] += weight[c, g] * (error * error)


@njit(nogil=True, cache=True, error_model="numpy")
def shifted_codes(x, weight, levels, low, inverse, l, ll, xl, code):  # type: ignore[no-untyped-def] # noqa: E741
    """Fills code [C, G], levels at a step with an inverse [G], and their weighted sums [G]."""
    l[:], ll[:], xl[:] = F32(0), F32(0), F32(0)
    for c in range(len(x)):
        for g in range(len(low)):
            y = inverse[g] * (x[c, g] - low[g])
            y = y if y < levels else levels
            level = np.rint(y) if y > 0 else F32(0)
            code[c, g] = level
            l[g] += weight[c, g] * level
            ll[g] += weight[c, g] * level * level
            xl[g] += weight[c, g] * level * x[c, g]


@njit(nogil=True, cache=True, error_model="numpy")
def shifted_scales(x, weight, levels, scale, minimum, work):  # type: ignore[no-untyped-def]
    """Fills scale and minimum >= 0 [G]: x [C, G] ~ scale * l - minimum, l in [0, levels].

    weight [C, G]; work [C + 11, G] is memory.
    """
    low, high, total, mean, inverse, best = work[0], work[1], work[2], work[3], work[4], work[5]
    l, ll, xl, s, o, code = work[6], work[7], work[8], work[9], work[10], work[11:]  # noqa: E741
    groups = len(scale)
    shifted_start(x, weight, levels, scale, work)
    for step in range(37):
        length = F32(-0.9) + F32(0.05) * F32(step) + levels
        for g in range(groups):
            inverse[g] = length / (high[g] - low[g])
        shifted_codes(x, weight, levels, low, inverse, l, ll, xl, code)
        for g in range(groups):
            spread = total[g] * ll[g] - l[g] * l[g]
            s[g], o[g] = (total[g] * xl[g] - mean[g] * l[g]) / spread, (ll[g] * mean[g] - l[g] * xl[g]) / spread
            s[g], o[g] = (xl[g] / ll[g], F32(0)) if o[g] > 0 else (s[g], o[g])
            inverse[g] = F32(0) if spread > 0 and high[g] > low[g] else F32(np.inf)  # what the error begins with
        for c in range(len(x)):
            for g in range(groups):
                error = s[g] * code[c, g] + o[g] - x[c, g]
                inverse[g] += weight[c, g] * (error * error)
        for g in range(groups):
            if inverse[g] < best[g]:  # the next step begins with this minimum
                best[g], scale[g], low[g] = inverse[g], s[g], o[g]
    for g in range(groups):
        minimum[g] = -low[g]


@njit(nogil=True, cache=True, error_model="numpy")
def positive_inverse(x, weight, levels, largest):  # type: ignore[no-untyped-def]
    """The inverse of the step among nine that leaves x [C] the least error."""
    inverse, best = F32(0), F32(np.inf)
    for tenth in EVERY_TENTH:
        tried, error = (F32(0.1) * F32(tenth) + levels) / largest, F32(0)
        step = F32(1) / tried
        for c in range(len(x)):
            level = np.rint(tried * x[c])
            miss = x[c] - step * (level if level < levels else levels)
            error += weight[c] * miss * miss
        if error < best:
            best, inverse = error, tried
    return inverse


@njit(nogil=True, cache=True, error_model="numpy")
def positive_step(x, weight, levels, codes):  # type: ignore[no-untyped-def]
    """The step d of x [C] ~ d * codes, x >= 0; fills codes [C], integers in [0, levels]."""
    largest, xl, ll = F32(0), F32(0), F32(0)
    for c in range(len(x)):
        largest = x[c] if x[c] > largest else largest
    if largest < EPSILON:
        codes[:] = F32(0)
        return F32(0)
    inverse = positive_inverse(x, weight, levels, largest)
    for c in range(len(x)):
        codes[c] = min(np.rint(inverse * x[c]), levels)
        xl += weight[c] * x[c] * codes[c]
        ll += weight[c] * codes[c] * codes[c]
    for _ in range(5):
        changes = 0
        for c in range(len(x)):
            a, b = xl - weight[c] * x[c] * codes[c], ll - weight[c] * codes[c] * codes[c]
            level = min(np.rint(x[c] * b / a), levels) if a > 0 and b > 0 else codes[c]
            if level != codes[c]:
                a, b = a + weight[c] * x[c] * level, b + weight[c] * level * level
                if a * a * ll > xl * xl * b:
                    codes[c], xl, ll = level, a, b
                    changes += 1
        if changes == 0:
            break
    return xl / ll if ll > 0 else F32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def prepare_row(x, importance, kind, block, side, weight, mean):  # type: ignore[no-untyped-def]
    """Fills side and weight [C, G], the values of a row [K] side by side and how much ggml lets their errors count.

    mean [S], of x^2, is scratch; block: columns that have one in common.
    """
    for s in range(len(mean)):
        mean[s] = F32(0)
        for j in range(s * block, (s + 1) * block):
            mean[s] += x[j] * x[j]
        mean[s] = kind.spread * mean[s] / F32(block)
    for g in range(side.shape[1]):
        base = mean[g * kind.width // block]
        for c in range(kind.width):
            j = g * kind.width + c
            side[c, g] = x[j]
            weight[c, g] = importance[j] if kind.spread < 0 else importance[j] * np.sqrt(base + x[j] * x[j])


@njit(nogil=True, cache=True, error_model="numpy")
def second_level(side, weight, kind, scale, minimum, blocks, d, dmin, a, b, work):  # type: ignore[no-untyped-def]
    """Fills d, dmin [S] and a, b [G] with the integers that stand for scale and minimum [G]."""
    per = len(scale) // blocks
    count = np.empty(per, F32)
    for s in range(blocks):
        part = slice(s * per, (s + 1) * per)
        x, y, codes = scale[part], minimum[part], a[part]
        count[:] = F32(0)
        for c in range(kind.width):
            for g in range(per):
                count[g] += weight[c, s * per + g]
        if kind.minima:
            d[s], dmin[s] = positive_step(x, count, kind.top, codes), positive_step(y, count, kind.top, b[part])
        elif kind.spread >= 0:
            found, inverse = work[5, :1], work[6, :1]
            signed_scales(x.reshape(per, 1), count.reshape(per, 1), kind.top, found, inverse, work[:5, :1])
            d[s] = found[0]
            for g in range(per):
                codes[g] = min(max(np.rint(inverse[0] * x[g]), -kind.top), kind.top - F32(1))
        else:
            extreme = F32(0)
            for g in range(per):
                extreme = x[g] if abs(x[g]) > abs(extreme) else extreme
            inverse_step = -kind.top / extreme if abs(extreme) >= EPSILON else F32(0)
            d[s] = F32(1) / inverse_step if inverse_step != 0 else F32(0)
            for g in range(per):
                codes[g] = min(np.rint(inverse_step * x[g]), kind.top - F32(1))


@njit(nogil=True, cache=True, error_model="numpy")
def search_rows(x, importance, kind, block, d, dmin, a, b, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, dmin [N, S] and a, b [N, G] for rows start to stop of x [N, K]; see `ggml_scales`."""
    groups, blocks = x.shape[1] // kind.width, x.shape[1] // block
    side, weight = np.empty((kind.width, groups), F32), np.empty((kind.width, groups), F32)
    work, mean, scale = np.empty((kind.width + 11, groups), F32), np.empty(blocks, F32), np.empty(groups, F32)
    other = np.zeros(groups, F32)
    for n in range(start, stop):
        prepare_row(x[n], importance, kind, block, side, weight, mean)
        if kind.minima:
            shifted_scales(side, weight, kind.levels, scale, other, work)
        else:
            signed_scales(side, weight, kind.levels, scale, other, work)
        if kind.top == 0:
            d[n], dmin[n] = scale, other
        else:
            second_level(side, weight, kind, scale, other, blocks, d[n], dmin[n], a[n], b[n], work)


def ggml_scales(x: Tensor, importance: Tensor, kind: Kind, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ggml takes.

    Args:
        x: float32 [N, K].
        importance: float32 [K].
        kind: the block type.
        block: columns of a super-block; K where there are none.

    Returns:
        (d, dmin, a, b), float32: steps [N, S], not yet in fp16, and integers [N, G]; without super-blocks d and dmin
        are scales and minima [N, G], and a and b empty. What a type does not have is undefined.
    """
    values, groups = x.float().contiguous().cpu().numpy(), x.shape[1] // kind.width
    steps = x.shape[1] // block if kind.top else groups
    found = [np.zeros((len(x), count), np.float32) for count in (steps, steps, groups, groups)]
    given = importance.float().contiguous().cpu().numpy()
    over_rows(lambda p, q: search_rows(values, given, kind, block, *found, p, q), len(values))
    d, dmin, a, b = (torch.from_numpy(part).to(x.device) for part in found)
    return d, dmin, a, b
