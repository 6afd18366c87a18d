"""ggml's encoders that search, repeated to the last bit: what ours must never fall behind.

These are the functions of ggml-quants.c (https://github.com/ggml-org/llama.cpp) that encode rows, with an importance
matrix or without, and `make_qp_quants`; in float32, every sum in ggml's order and no operations contracted. How scales
of single groups are found is in `ggml.groups`.

Shape letters: N rows, K columns, C columns of a group, G groups of a row, S super-blocks of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import searchable
from qtool.numerics.ggml.groups import EPSILON, F32, Sweep, polished_scales, shifted_scales, signed_scales, sweep_of
from qtool.numerics.threads.parallel import over_rows

EVERY_TENTH = (0, -4, -3, -2, -1, 1, 2, 3, 4)
"""Tenths of a level by which the largest scale lands beyond the last integer."""
WEIGHTED = sweep_of(-0.9, 37, 0.05)
"""With an importance matrix all types are searched so."""


class ScaleSearch(NamedTuple):
    """What ggml does for one block type.

    Attributes:
        width: columns of a group.
        levels: the largest level; with signs, minus the lowest one.
        top: likewise of the integers that stand for scales; 0: there are none, every group has a scale of its own.
        minima: whether groups have them; without, levels are signed.
        spread: an error counts importance * sqrt(spread * mean(x^2) + x^2); -1: importance alone.
        sweep: the steps without importances; where there are no minima and no steps, codes are improved one by one.
        flat: without importances an error of groups with minima counts |x| + flat * the group's root mean square, and
            of others x^2.
    """

    width: int
    levels: np.float32
    top: np.float32
    minima: bool
    spread: np.float32
    sweep: Sweep
    flat: np.float32


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def as_byte(level):  # type: ignore[no-untyped-def]
    """A code as ggml keeps it: 256 is added to those below 0, which a negative x leads to."""
    return F32(np.uint8(np.int32(level)))


@njit(nogil=True, cache=True, error_model="numpy")
def positive_inverse(x, weight, levels, largest):  # type: ignore[no-untyped-def]
    """The inverse of the step among nine that leaves x [C] the least error."""
    inverse, best = F32(0), F32(np.inf)
    for tenth in EVERY_TENTH:
        tried, error = (F32(0.1) * F32(tenth) + levels) / largest, F32(0)
        step = F32(1) / tried
        for c in range(len(x)):
            level = np.rint(tried * x[c])
            miss = x[c] - step * (as_byte(level) if tenth == 0 else level if level < levels else levels)
            error += weight[c] * miss * miss
        if error < best:
            best, inverse = error, tried
    return inverse


@njit(nogil=True, cache=True, error_model="numpy")
def positive_step(x, weight, levels, codes):  # type: ignore[no-untyped-def]
    """The step d of x [C] ~ d * codes; fills codes [C], integers up to levels. x >= 0, apart from IQ2_XXS."""
    largest, xl, ll = F32(0), F32(0), F32(0)
    for c in range(len(x)):
        largest = x[c] if x[c] > largest else largest
    if largest < EPSILON:
        codes[:] = F32(0)
        return F32(0)
    inverse = positive_inverse(x, weight, levels, largest)
    for c in range(len(x)):
        level = min(np.rint(inverse * x[c]), levels)
        xl += weight[c] * x[c] * level
        ll += weight[c] * level * level
        codes[c] = as_byte(level)
    for _ in range(5):
        changes = 0
        for c in range(len(x)):
            a, b = xl - weight[c] * x[c] * codes[c], ll - weight[c] * codes[c] * codes[c]
            level = min(np.rint(x[c] * b / a), levels) if a > 0 and b > 0 else codes[c]
            if level != codes[c]:
                a, b = a + weight[c] * x[c] * level, b + weight[c] * level * level
                if a * a * ll > xl * xl * b:
                    codes[c], xl, ll = as_byte(level), a, b
                    changes += 1
        if changes == 0:
            break
    return xl / ll if ll > 0 else F32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def weigh_row(x, importance, kind, block, side, weight):  # type: ignore[no-untyped-def]
    """Fills side and weight [C, G], the values of a row [K] side by side and how much ggml lets their errors count.

    block: columns that have a mean of x^2 in common.
    """
    for s in range(len(x) // block):
        mean = F32(0)
        for j in range(s * block, (s + 1) * block):
            mean += x[j] * x[j]
        mean = kind.spread * mean / F32(block)
        for g in range(s * block // kind.width, (s + 1) * block // kind.width):
            for c in range(kind.width):
                j = g * kind.width + c
                side[c, g] = x[j]
                weight[c, g] = importance[j] if kind.spread < 0 else importance[j] * np.sqrt(mean + x[j] * x[j])


@njit(nogil=True, cache=True, error_model="numpy")
def weigh_plain_row(x, kind, side, weight):  # type: ignore[no-untyped-def]
    """As `weigh_row`, without importances."""
    for g in range(side.shape[1]):
        square = F32(0)
        for c in range(kind.width):
            value = x[g * kind.width + c]
            side[c, g], weight[c, g] = value, value * value
            square += value * value
        if kind.minima:
            flat = kind.flat * np.sqrt(square / F32(kind.width))
            for c in range(kind.width):
                weight[c, g] = flat + abs(side[c, g])


@njit(nogil=True, cache=True, error_model="numpy")
def rounded_step(x, top, signed, codes):  # type: ignore[no-untyped-def]
    """The step d of x [C] ~ d * codes whose largest code is top, or with signs -top; fills codes [C]."""
    extreme = F32(0)
    for g in range(len(x)):
        extreme = x[g] if (abs(x[g]) if signed else x[g]) > abs(extreme) else extreme
    if abs(extreme) < EPSILON:
        codes[:] = F32(0)
        return F32(0)
    inverse, last = (-top / extreme, top - F32(1)) if signed else (top / extreme, top)
    for g in range(len(x)):
        codes[g] = min(np.rint(inverse * x[g]), last)
    return F32(1) / inverse if signed else extreme / top


@njit(nogil=True, cache=True, error_model="numpy")
def searched_steps(x, y, count, kind, d, dmin, a, b, work):  # type: ignore[no-untyped-def]
    """Fills d, dmin [1] and a, b [groups] for scales x and minima y [groups] that count as much as `count`."""
    if kind.minima:
        d[0], dmin[0] = positive_step(x, count, kind.top, a), positive_step(y, count, kind.top, b)
        return
    inverse = work[5, :1]
    signed_scales(x.reshape(len(x), 1), count.reshape(len(x), 1), kind.top, d, inverse, work[:5, :1])
    for g in range(len(x)):
        a[g] = min(max(np.rint(inverse[0] * x[g]), -kind.top), kind.top - F32(1))


@njit(nogil=True, cache=True, error_model="numpy")
def second_level(weight, kind, searched, scale, minimum, d, dmin, a, b, work):  # type: ignore[no-untyped-def]
    """Fills d, dmin [S] and a, b [G] with the integers that stand for scale and minimum [G]."""
    per = len(scale) // len(d)
    count = np.empty(per, F32)
    for s in range(len(d)):
        part, this = slice(s * per, (s + 1) * per), slice(s, s + 1)
        if searched:
            count[:] = F32(0)
            for c in range(kind.width):
                for g in range(per):
                    count[g] += weight[c, s * per + g]
            searched_steps(scale[part], minimum[part], count, kind, d[this], dmin[this], a[part], b[part], work)
            continue
        d[s] = rounded_step(scale[part], kind.top, not kind.minima, a[part])
        if kind.minima:
            dmin[s] = rounded_step(minimum[part], kind.top, False, b[part])


@njit(nogil=True, cache=True, error_model="numpy")
def ggml_rows(x, importance, kind, block, d, dmin, a, b, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, dmin [N, S] and a, b [N, G] for rows start to stop of x [N, K]; see `ggml_scales`."""
    groups, weighted = x.shape[1] // kind.width, len(importance) > 0
    side, weight = np.empty((kind.width, groups), F32), np.empty((kind.width, groups), F32)
    work, scale, other = np.empty((kind.width + 11, groups), F32), np.empty(groups, F32), np.zeros(groups, F32)
    for n in range(start, stop):
        if weighted:
            weigh_row(x[n], importance, kind, block, side, weight)
        else:
            weigh_plain_row(x[n], kind, side, weight)
        if kind.minima:
            shifted_scales(side, weight, kind.levels, kind.sweep, scale, other, work)
        elif kind.sweep.steps > 0:
            signed_scales(side, weight, kind.levels, scale, other, work)
        else:
            polished_scales(side, weight, kind.levels, scale, work)
        if kind.top == 0:
            d[n], dmin[n] = scale, other
        else:
            searched = weighted and kind.spread >= 0
            second_level(weight, kind, searched, scale, other, d[n], dmin[n], a[n], b[n], work)


def ggml_scales(
    x: Tensor, importance: Tensor | None, kind: ScaleSearch, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ggml takes.

    Args:
        x: float32 [N, K].
        importance: float32 [K] or None.
        kind: the block type.
        block: columns of a super-block; K where there are none.

    Returns:
        (d, dmin, a, b), float32: steps [N, S], not yet in fp16, and integers [N, G]; without super-blocks d and dmin
        are scales and minima [N, G], and a and b empty. What a type does not have is undefined.
    """
    if x.is_cuda and importance is None:
        from qtool.numerics.ggml import cuda_search

        return cuda_search.ggml_scales(x, kind, block)
    values, groups = searchable(x), x.shape[1] // kind.width
    steps = x.shape[1] // block if kind.top else groups
    found = [np.zeros((len(x), count), np.float32) for count in (steps, steps, groups, groups)]
    importances = np.empty(0, np.float32)
    if importance is not None:
        importances, kind = importance.float().contiguous().cpu().numpy(), kind._replace(sweep=WEIGHTED)
    over_rows(lambda p, q: ggml_rows(values, importances, kind, block, *found, p, q), len(values))
    d, dmin, a, b = (torch.from_numpy(part).to(x.device) for part in found)
    return d, dmin, a, b
