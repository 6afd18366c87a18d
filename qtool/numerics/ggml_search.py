"""The scale searches of ggml's encoders, compiled: what a search of our own must never fall behind.

These are `make_qkx3_quants`, `make_qp_quants` and `make_qx_quants` of ggml-quants.c
(https://github.com/ggml-org/llama.cpp) in float32 with sums in another order: where two candidates are equally good to
six digits, ggml may take the other one.

Shape letters: C columns of a group, G groups of a super-block.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}
F32 = np.float32
EPSILON = F32(1e-15)
"""Below this ggml takes a group for zeros."""
NEAREST_FIRST = (0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)
"""Tenths of a level by which the signed search lets the largest value land beyond the lowest level."""


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def extreme_of(x):  # type: ignore[no-untyped-def]
    """The value that is largest in size, with its sign."""
    low, high = F32(0), F32(0)
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    return high if high > -low else low


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def weights(x, importance, mean, weight):  # type: ignore[no-untyped-def]
    """Fills weight [C], how much ggml lets an error count, and returns its sum; mean is a multiple of that of x^2."""
    total = F32(0)
    for j in range(len(x)):
        weight[j] = importance[j] * np.sqrt(mean + x[j] * x[j])
        total += weight[j]
    return total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def scale_and_minimum(x, weight, highest):  # type: ignore[no-untyped-def]
    """(scale, minimum) of a group: x [C] ~ scale * l - minimum, l in [0, highest], minimum >= 0."""
    low, high, total, mean = x[0], x[0], F32(0), F32(0)
    for j in range(len(x)):
        low, high = min(low, x[j]), max(high, x[j])
        total += weight[j]
        mean += weight[j] * x[j]
    low = min(low, F32(0))
    if high <= low:
        return F32(0), -low
    scale, best = (high - low) / highest, F32(0)
    for j in range(len(x)):
        level = min(max(np.rint((x[j] - low) / scale), F32(0)), highest)
        error = x[j] - low - scale * level
        best += weight[j] * error * error
    for i in range(37):
        inverse = (highest + F32(0.05) * F32(i) - F32(0.9)) / (high - low)
        ls, ll, xl = F32(0), F32(0), F32(0)
        for j in range(len(x)):
            level = min(max(np.rint(inverse * (x[j] - low)), F32(0)), highest)
            ls += weight[j] * level
            ll += weight[j] * level * level
            xl += weight[j] * level * x[j]
        spread = total * ll - ls * ls
        if spread <= 0:
            continue
        s, o = (total * xl - mean * ls) / spread, (ll * mean - ls * xl) / spread
        if o > 0:
            s, o = xl / ll, F32(0)
        found = F32(0)
        for j in range(len(x)):
            error = x[j] - o - s * min(max(np.rint(inverse * (x[j] - low)), F32(0)), highest)
            found += weight[j] * error * error
        if found < best:  # the next try starts from here
            best, scale, low = found, s, o
    return scale, -low


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def positive_step(x, weight, highest, codes):  # type: ignore[no-untyped-def]
    """The step d of x [G] ~ d * codes, x >= 0; fills codes [G], integers in [0, highest]."""
    largest, inverse, best = max(extreme_of(x), EPSILON), F32(0), F32(np.inf)
    for k in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        t, found = (highest + F32(0.1) * F32(k)) / largest, F32(0)
        for i in range(len(x)):
            error = x[i] - min(np.rint(t * x[i]), highest) / t
            found += weight[i] * error * error
        if found < best:
            best, inverse = found, t
    xl, ll = F32(0), F32(0)
    for i in range(len(x)):
        codes[i] = min(np.rint(inverse * x[i]), highest)
        xl += weight[i] * x[i] * codes[i]
        ll += weight[i] * codes[i] * codes[i]
    for _ in range(5):
        changes = 0
        for i in range(len(x)):
            a, b = xl - weight[i] * x[i] * codes[i], ll - weight[i] * codes[i] * codes[i]
            if a <= 0 or b <= 0:
                continue
            code = min(np.rint(x[i] * b / a), highest)
            a, b = a + weight[i] * x[i] * code, b + weight[i] * code * code
            if code != codes[i] and a * a * ll > xl * xl * b:
                codes[i], xl, ll = code, a, b
                changes += 1
        if changes == 0:
            break
    return xl / ll if ll > 0 else F32(0)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def signed_step(x, weight, lowest, codes):  # type: ignore[no-untyped-def]
    """The step d of x [G] ~ d * codes; fills codes [G], integers in [lowest, -lowest - 1]."""
    extreme, best, step, inverse = extreme_of(x), F32(0), F32(0), F32(0)
    for i in NEAREST_FIRST:
        t, xl, ll = (lowest - F32(0.1) * F32(i)) / extreme if abs(extreme) >= EPSILON else F32(0), F32(0), F32(0)
        for j in range(len(x)):
            level = min(max(np.rint(t * x[j]), lowest), -lowest - F32(1))
            xl += weight[j] * x[j] * level
            ll += weight[j] * level * level
        if ll > 0 and xl * xl > best * ll:
            best, step, inverse = xl * xl / ll, xl / ll, t
    for j in range(len(x)):
        codes[j] = min(max(np.rint(inverse * x[j]), lowest), -lowest - F32(1))
    return step
