"""Free scales and minima of single groups by least squares over many clippings at once, and steps that they share.

Trials lie side by side in vector registers, so that short groups leave no lane idle. The one in `search` goes through
clippings one after the other, for groups of any length and for integer zero points, each of which is scored by itself;
here offsets are free, and all trials share one pass over a group. Sums have another order in each, so neither can give
the other's bytes.

Shape letters: C columns of a group (a multiple of 4), G groups of a super-block, T trials.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import njit

from qtool.numerics.scales.search import FAST, clip_ratios

F32 = np.float32
EPSILON = F32(1e-15)
"""Below this a group counts as zeros."""
LANES = 16
"""Trials that are compared at once; their number is a multiple of it."""
STRETCH = np.array([*np.linspace(0.75, 1.1, 12), 1.25, 1.5, 2, 3], np.float32)
"""Where the largest scale lands, relative to the last integer, when a step is searched; beyond it only one that hardly
counts may."""


@cache
def signed_trials(lowest: int, count: int) -> np.ndarray:
    """Table of a sweep for x ~ s * l: where the largest weight lands relative to the lowest level; float32 [2, T].

    Which end of the grid the largest weight takes matters to coarse ones.
    """
    signs = (1, -1) if lowest >= -16 else (1,)
    own = clip_ratios(-2 * lowest, count // len(signs))
    ratios = [sign * ratio for ratio in own for sign in signs]
    return np.stack([np.array(ratios), np.zeros(len(ratios))]).astype(np.float32)


@cache
def offset_trials(highest: int, count: int) -> np.ndarray:
    """Table of a sweep for x ~ s * l + o: length of the grid over the group's range, and its middle; float32 [2, T]."""
    ratios = clip_ratios(highest + 1, count // 4)
    shifts = (-0.375, -0.125, 0.125, 0.375)
    return np.array([[ratio, highest / 2 + shift] for ratio in ratios for shift in shifts], np.float32).T.copy()


@njit(nogil=True, cache=True, error_model="numpy")
def half(x):  # type: ignore[no-untyped-def]
    """The fp16 number nearest to x, subnormal ones included."""
    if x == 0:
        return F32(0)
    _, exponent = math.frexp(x)
    step = math.ldexp(1.0, max(exponent, -13) - 11)
    return F32(np.rint(x / step) * step)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def extreme_of(x):  # type: ignore[no-untyped-def]
    """The value that is largest in size, with its sign."""
    low, high = F32(0), F32(0)
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    return high if high > -low else low


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def best_trial(sums, count):  # type: ignore[no-untyped-def]
    """The first of `count` trials with the largest sums[2]^2 / sums[1]: what least squares takes off the error."""
    best, first = F32(0), 0
    for part in range(0, count, LANES):  # a part fills a vector register, in which there is nothing to look for yet
        most = F32(0)
        for t in range(part, part + LANES):
            sums[0, t] = sums[2, t] * sums[2, t] / max(sums[1, t], EPSILON)
            most = max(most, sums[0, t])
        if most > best:
            best, first = most, part
    for t in range(first, first + LANES):
        if sums[0, t] == best:
            return t
    return first


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def sweep_offset(x, weight, total, mean, low, high, table, highest, sums):  # type: ignore[no-untyped-def]
    """Makes all trials of a table [2, T] on a group [C] for a grid over [low, high]; returns the best.

    The levels of trial t are l = round(y * table[0, t] + table[1, t]), y being x moved and scaled to the grid's length.
    Fills sums [4, T]: what least squares take off the error, and w (l - mean l)^2, w l (x - mean), w l.
    """
    middle, factor, count = (low + high) / F32(2), highest / (high - low), table.shape[1]
    for t in range(count):
        sums[1, t], sums[2, t], sums[3, t] = F32(0), F32(0), F32(0)
    for j in range(0, len(x), 4):
        w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        x0, x1, x2, x3 = w0 * (x[j] - mean), w1 * (x[j + 1] - mean), w2 * (x[j + 2] - mean), w3 * (x[j + 3] - mean)
        y0, y1 = (x[j] - middle) * factor, (x[j + 1] - middle) * factor
        y2, y3 = (x[j + 2] - middle) * factor, (x[j + 3] - middle) * factor
        for t in range(count):
            l0 = min(max(np.rint(y0 * table[0, t] + table[1, t]), F32(0)), highest)
            l1 = min(max(np.rint(y1 * table[0, t] + table[1, t]), F32(0)), highest)
            l2 = min(max(np.rint(y2 * table[0, t] + table[1, t]), F32(0)), highest)
            l3 = min(max(np.rint(y3 * table[0, t] + table[1, t]), F32(0)), highest)
            m0, m1, m2, m3 = w0 * l0, w1 * l1, w2 * l2, w3 * l3
            sums[1, t] += m0 * l0 + m1 * l1 + m2 * l2 + m3 * l3
            sums[2, t] += x0 * l0 + x1 * l1 + x2 * l2 + x3 * l3
            sums[3, t] += m0 + m1 + m2 + m3
    for t in range(count):
        sums[1, t] -= sums[3, t] * sums[3, t] / total
    return best_trial(sums, count)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def free_offset(x, weight, reach, near, most, table, highest, sums):  # type: ignore[no-untyped-def]
    """The best (scale, offset <= most) of a group [C], how much an error of the scale counts, mean level, sum(w).

    Where columns that hardly count set the group's range (reach [C], see `search.prepared`), the range without them is
    tried too, if it is shorter than `near` times the whole. table [2, T]; sums [4, T] is scratch.
    """
    low, high, near_low, near_high, total, mean = most, x[0], most, x[0] * reach[0], F32(0), F32(0)
    for j in range(len(x)):
        low, high = min(low, x[j]), max(high, x[j])
        near_low, near_high = min(near_low, x[j] * reach[j]), max(near_high, x[j] * reach[j])
        total += weight[j]
        mean += weight[j] * x[j]
    mean /= total
    if high <= low:
        return F32(0), min(mean, most), F32(0), F32(0), total
    t = sweep_offset(x, weight, total, mean, low, high, table, highest, sums)
    gain, curvature, level = sums[0, t], sums[1, t], sums[3, t] / total
    scale = sums[2, t] / max(sums[1, t], EPSILON)
    if F32(0) < near_high - near_low < near * (high - low):
        t = sweep_offset(x, weight, total, mean, near_low, near_high, table, highest, sums)
        if sums[0, t] > gain:
            curvature, level, scale = sums[1, t], sums[3, t] / total, sums[2, t] / sums[1, t]
    return scale, min(mean - scale * level, most), curvature, level, total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def sweep_scale(x, weight, factor, table, count, lowest, highest, sums):  # type: ignore[no-untyped-def]
    """Makes the first `count` trials on a group [C], levels being round(x * factor * table[0, t]); returns the best.

    Fills sums [3, T]: what least squares take off the error, and w l^2, w l x.
    """
    for t in range(count):
        sums[1, t], sums[2, t] = F32(0), F32(0)
    for j in range(0, len(x), 4):
        w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        x0, x1, x2, x3 = w0 * x[j], w1 * x[j + 1], w2 * x[j + 2], w3 * x[j + 3]
        y0, y1, y2, y3 = factor * x[j], factor * x[j + 1], factor * x[j + 2], factor * x[j + 3]
        for t in range(count):
            l0 = min(max(np.rint(y0 * table[0, t]), lowest), highest)
            l1 = min(max(np.rint(y1 * table[0, t]), lowest), highest)
            l2 = min(max(np.rint(y2 * table[0, t]), lowest), highest)
            l3 = min(max(np.rint(y3 * table[0, t]), lowest), highest)
            sums[1, t] += w0 * l0 * l0 + w1 * l1 * l1 + w2 * l2 * l2 + w3 * l3 * l3
            sums[2, t] += x0 * l0 + x1 * l1 + x2 * l2 + x3 * l3
    return best_trial(sums, count)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def free_scale(x, weight, reach, near, table, lowest, highest, sums):  # type: ignore[no-untyped-def]
    """The best scale of a group [C], either sign, and how much an error of it counts.

    Arguments as in `free_offset`; the table is one of `signed_trials`.
    """
    extreme, largest, count = extreme_of(x), F32(0), table.shape[1]
    if abs(extreme) < EPSILON:
        return F32(0), F32(0)
    for j in range(len(x)):
        largest = max(largest, abs(x[j]) * reach[j])
    t = sweep_scale(x, weight, lowest / extreme, table, count, lowest, highest, sums)
    gain, curvature, scale = sums[0, t], sums[1, t], sums[2, t] / sums[1, t]
    if EPSILON < largest < near * abs(extreme):
        t = sweep_scale(x, weight, lowest / largest, table, count, lowest, highest, sums)
        if sums[0, t] > gain:
            curvature, scale = sums[1, t], sums[2, t] / sums[1, t]
    return scale, curvature


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def shared_step(x, weight, low, top, codes):  # type: ignore[no-untyped-def]
    """The d, in fp16, on whose multiples the x [G] lie best; fills codes [G], integers in [low, top]."""
    extreme, best, d = extreme_of(x), F32(np.inf), F32(0)
    for i in range(len(STRETCH)):
        t, found = extreme / ((low if low < 0 else top) * STRETCH[i]), F32(0)
        inverse = F32(1) / t if t != 0 else F32(0)
        for g in range(len(x)):
            error = x[g] - t * min(max(np.rint(x[g] * inverse), low), top)
            found += weight[g] * error * error
        if found < best:
            best, d = found, t
    d = half(d)
    for g in range(len(x)):
        codes[g] = min(max(np.rint(x[g] / d), low), top) if d != 0 else F32(0)
    return d
