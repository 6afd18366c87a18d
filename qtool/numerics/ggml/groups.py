"""Scales of single groups as ggml's encoders find them, repeated to the last bit; see `ggml.search`.

These are `make_qx_quants`, `make_q3_quants`, `make_qkx2_quants` and `make_qkx3_quants` of ggml-quants.c
(https://github.com/ggml-org/llama.cpp). All groups of a row lie side by side, so that they fill vector registers:
column c of group g is x[c, g].

Shape letters: C columns of a group, G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

F32 = np.float32
EPSILON = F32(1e-15)
"""Below this ggml takes a group for zeros."""
NEAREST_FIRST = (0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)
"""Tenths of a level by which the signed search lets the largest value land beyond the lowest level."""
PASSES = 5
"""Of the improvement code by code."""


class Sweep(NamedTuple):
    """The steps that ggml tries for a group.

    Attributes:
        first: where the largest value lands, in levels beyond the last one.
        more: by how many levels that grows from step to step.
        steps: how many.
        absolute: errors count by their size, not by their square.
    """

    first: np.float32
    more: np.float32
    steps: int
    absolute: bool


def sweep_of(first: float, steps: int, more: float = 0.1, absolute: bool = False) -> Sweep:
    """A sweep in the types that kernels want."""
    return Sweep(F32(first), F32(more), steps, absolute)


@njit(nogil=True, cache=True, error_model="numpy")
def add_column(x, weight, c, g, step, levels, xl, ll):  # type: ignore[no-untyped-def]
    """Two weighted sums with what column c of group g, rounded at a step with that inverse, adds to them."""
    level = np.rint(step * x[c, g])
    level = level if level > -levels else -levels
    level = level if level < levels - F32(1) else levels - F32(1)
    return xl + weight[c, g] * x[c, g] * level, ll + weight[c, g] * level * level


@njit(nogil=True, cache=True, error_model="numpy")
def signed_scales(x, weight, levels, scale, inverse, work):  # type: ignore[no-untyped-def]
    """Fills scale [G], x [C, G] ~ scale * l, l in [-levels, levels - 1], and inverse [G] of the steps that gave l.

    weight [C, G], C a multiple of 4; work [5, G] is memory.
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
        for c in range(0, len(x), 4):  # four at a time, so that sums stay in registers
            for g in range(len(scale)):
                a, b = add_column(x, weight, c, g, step[g], levels, xl[g], ll[g])
                a, b = add_column(x, weight, c + 1, g, step[g], levels, a, b)
                a, b = add_column(x, weight, c + 2, g, step[g], levels, a, b)
                xl[g], ll[g] = add_column(x, weight, c + 3, g, step[g], levels, a, b)
        for g in range(len(scale)):
            if tenth == 0 or (ll[g] > 0 and xl[g] * xl[g] > best[g] * ll[g]):
                scale[g] = xl[g] / ll[g] if ll[g] != 0 else F32(0)
                best[g], inverse[g] = scale[g] * xl[g], step[g]


@njit(nogil=True, cache=True, error_model="numpy")
def rounded_codes(x, weight, levels, code, extreme, xl, ll):  # type: ignore[no-untyped-def]
    """Fills code [C, G], levels at the step that puts the extreme on -levels, and their weighted sums [G]."""
    extreme[:], xl[:], ll[:] = F32(0), F32(0), F32(0)
    for c in range(len(x)):
        for g in range(len(xl)):
            extreme[g] = x[c, g] if abs(x[c, g]) > abs(extreme[g]) else extreme[g]
    for g in range(len(xl)):
        extreme[g] = -levels / extreme[g] if abs(extreme[g]) >= EPSILON else F32(0)
    for c in range(len(x)):
        for g in range(len(xl)):
            level = min(max(np.rint(extreme[g] * x[c, g]), -levels), levels - F32(1))
            code[c, g] = level
            xl[g] += weight[c, g] * x[c, g] * level
            ll[g] += weight[c, g] * level * level


@njit(nogil=True, cache=True, error_model="numpy")
def polished_scales(x, weight, levels, scale, work):  # type: ignore[no-untyped-def]
    """Fills scale [G], x [C, G] ~ scale * l: rounded once, then code by code where that helps; work [C + 3, G].

    ggml leaves a group after a pass that changed nothing of it; a further pass would not either.
    """
    xl, ll, code = work[0], work[1], work[3 : 3 + len(x)]
    rounded_codes(x, weight, levels, code, work[2], xl, ll)
    for _ in range(PASSES):
        changes = 0
        for c in range(len(x)):
            for g in range(len(scale)):
                wx, old = weight[c, g] * x[c, g], code[c, g]
                a, b = xl[g] - wx * old, ll[g] - weight[c, g] * old * old
                level = min(max(np.rint(x[c, g] * b / a), -levels), levels - F32(1)) if a > 0 else old
                a, b = a + wx * level, b + weight[c, g] * level * level
                better = level != old and b > 0 and a * a * ll[g] > xl[g] * xl[g] * b
                code[c, g], xl[g], ll[g] = (level, a, b) if better else (old, xl[g], ll[g])
                changes += better
        if changes == 0:
            break
    for g in range(len(scale)):
        scale[g] = xl[g] / ll[g] if ll[g] > 0 else F32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def shifted_start(x, weight, levels, absolute, scale, work):  # type: ignore[no-untyped-def]
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
            error = abs(scale[g] * level + low[g] - x[c, g])
            best[g] += weight[c, g] * (error if absolute else error * error)


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
def shifted_scales(x, weight, levels, sweep, scale, minimum, work):  # type: ignore[no-untyped-def]
    """Fills scale and minimum >= 0 [G]: x [C, G] ~ scale * l - minimum, l in [0, levels].

    weight [C, G]; work [C + 11, G] is memory.
    """
    low, high, total, mean, inverse, best = work[0], work[1], work[2], work[3], work[4], work[5]
    l, ll, xl, s, o, code = work[6], work[7], work[8], work[9], work[10], work[11:]  # noqa: E741
    groups = len(scale)
    shifted_start(x, weight, levels, sweep.absolute, scale, work)
    for step in range(sweep.steps):
        length = sweep.first + sweep.more * F32(step) + levels
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
                error = abs(s[g] * code[c, g] + o[g] - x[c, g])
                inverse[g] += weight[c, g] * (error if sweep.absolute else error * error)
        for g in range(groups):
            if inverse[g] < best[g]:  # the next step begins with this minimum
                best[g], scale[g], low[g] = inverse[g], s[g], o[g]
    for g in range(groups):
        minimum[g] = -low[g]
