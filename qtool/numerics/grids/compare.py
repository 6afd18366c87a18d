"""The exact comparison in which a search ends: its choice stays only if it is really better than that of a simple rule.

Searches choose among many candidates by fast sums in float32, whose order follows the processor's vector registers:
what they find is good, not sure to be better than a rule without a search. So each ends here. Of two choices of
parameters, the second is taken if the error of what a runtime decodes is smaller by more than `TIE`. Errors are summed
in float32 first, with a bound on what that may be off by, and in float64 where this leaves a doubt. Their terms have
one sign, so that a sum in float64 is the same to 1e-13 in whatever order, and the decision is the same everywhere.

Shape letters: N rows, C columns, G groups of C / G columns, S blocks of C / S columns, each of whole groups.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.grids.minifloat import Grid, inverse_step, power_of
from qtool.numerics.threads.parallel import over_rows

F32 = np.float32
TIE = 1e-9
"""Errors that differ by less, relative to the first one, are equal: then the first choice stays."""
ORDER = {"reassoc"}
ROUGH = {"reassoc", "contract", "arcp"}
"""Freedoms of the compiler in sums of float64, and of float32. NaN and infinity count: they are a doubt."""
ROUNDINGS = 8
"""Of a term of a sum in float32, before it is added."""


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ROUGH)
def rough_step_error(x, weight, s, o, lowest, highest):  # type: ignore[no-untyped-def]
    """Weighted squared error of a group x [C] on levels that are consecutive integers, in float32."""
    inverse, zero = (F32(1) / s, o) if s != 0 else (F32(0), F32(0))
    total = F32(0)
    for j in range(len(x)):
        level = min(max(np.rint((x[j] - zero) * inverse), lowest), highest)
        error = x[j] - (level * s + o)
        total += weight[j] * error * error
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ORDER)
def exact_step_error(x, weight, s, o, lowest, highest):  # type: ignore[no-untyped-def]
    """As `rough_step_error`, in float64, and rounded and decoded as `affine` does."""
    divisor, zero = (s, o) if s != 0 else (F32(np.inf), F32(0))
    total = 0.0
    for j in range(len(x)):
        level = min(max(np.rint((x[j] - zero) / divisor), lowest), highest)
        error = np.float64(level * s + o) - np.float64(x[j])
        total += np.float64(weight[j]) * error * error
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def step_rows(w, first, second, ends, weight, better, start, stop):  # type: ignore[no-untyped-def]
    """Fills better, bool [N, S], for rows start to stop; first, second: (scale, offset), [N, G] each."""
    (s, o), (t, p), (lowest, highest) = first, second, ends
    per, width = s.shape[1] // better.shape[1], w.shape[1] // s.shape[1]
    doubt = F32(2**-23) * F32(per * width + ROUNDINGS)
    for n in range(start, stop):
        for b in range(better.shape[1]):
            a, c = F32(0), F32(0)
            for g in range(b * per, (b + 1) * per):
                x, m = w[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
                a += rough_step_error(x, m, s[n, g], o[n, g], lowest, highest)
                c += rough_step_error(x, m, t[n, g], p[n, g], lowest, highest)
            better[n, b] = c < a
            if abs(c - a) > doubt * (a + c):
                continue
            before, after = 0.0, 0.0
            for g in range(b * per, (b + 1) * per):
                x, m = w[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
                before += exact_step_error(x, m, s[n, g], o[n, g], lowest, highest)
                after += exact_step_error(x, m, t[n, g], p[n, g], lowest, highest)
            better[n, b] = after < before * (1 - TIE)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ROUGH)
def rough_cast_error(x, weight, s, smallest, mantissa, highest):  # type: ignore[no-untyped-def]
    """Weighted squared error of a group x [C] on the levels of a `minifloat.Grid`, in float32."""
    inverse = F32(1) / s if s != 0 else F32(0)
    total = F32(0)
    for j in range(len(x)):
        size = min(abs(x[j]) * inverse, highest)
        power = power_of(size, smallest)
        step = np.int32(power - np.int32(mantissa << 23)).view(F32)
        error = abs(x[j]) - np.rint(size * inverse_step(power, mantissa)) * step * s
        total += weight[j] * error * error
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=ORDER)
def exact_cast_error(x, weight, s, smallest, mantissa, highest):  # type: ignore[no-untyped-def]
    """As `rough_cast_error`, in float64, and rounded and decoded as `minifloat` does."""
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


@njit(nogil=True, cache=True, error_model="numpy")
def cast_rows(w, s, t, smallest, mantissa, highest, weight, better, start, stop):  # type: ignore[no-untyped-def]
    """As `step_rows`, for scales s and t [N, G] of a `minifloat.Grid`."""
    per, width = s.shape[1] // better.shape[1], w.shape[1] // s.shape[1]
    doubt = F32(2**-23) * F32(per * width + ROUNDINGS)
    for n in range(start, stop):
        for b in range(better.shape[1]):
            a, c = F32(0), F32(0)
            for g in range(b * per, (b + 1) * per):
                x, m = w[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
                a += rough_cast_error(x, m, s[n, g], smallest, mantissa, highest)
                c += rough_cast_error(x, m, t[n, g], smallest, mantissa, highest)
            better[n, b] = c < a
            if abs(c - a) > doubt * (a + c):
                continue
            before, after = 0.0, 0.0
            for g in range(b * per, (b + 1) * per):
                x, m = w[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
                before += exact_cast_error(x, m, s[n, g], smallest, mantissa, highest)
                after += exact_cast_error(x, m, t[n, g], smallest, mantissa, highest)
            better[n, b] = after < before * (1 - TIE)


def better_steps(
    w: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    ends: tuple[float, float],
    weight: Tensor,
    blocks: int,
) -> Tensor:
    """Where a second choice is better, for levels that are consecutive integers; see `affine.round_to_levels`.

    Args:
        w: float32 [N, C].
        first: (scale, offset), float32 [N, G] each.
        second: the same.
        ends: first and last level.
        weight: float32 [C], of a squared error.
        blocks: S.

    Returns:
        bool [N, S].
    """
    found = np.empty((len(w), blocks), np.bool_)
    x, m = (t.contiguous().cpu().numpy() for t in (w, weight))
    pairs = [tuple(p.contiguous().cpu().numpy() for p in pair) for pair in (first, second)]
    limits = F32(ends[0]), F32(ends[1])
    over_rows(lambda a, b: step_rows(x, *pairs, limits, m, found, a, b), len(w))
    return torch.from_numpy(found).to(w.device)


def better_casts(w: Tensor, first: Tensor, second: Tensor, grid: Grid, weight: Tensor, blocks: int) -> Tensor:
    """As `better_steps`, for scales, float32 [N, G] each, of levels to which `minifloat.nearest_levels` rounds w."""
    found = np.empty((len(w), blocks), np.bool_)
    x, s, t, m = (t.contiguous().cpu().numpy() for t in (w, first, second, weight))
    over_rows(lambda a, b: cast_rows(x, s, t, *grid.numbers, m, found, a, b), len(w))
    return torch.from_numpy(found).to(w.device)


def better(second: Tensor, first: Tensor) -> Tensor:
    """Where errors of a second choice are smaller than those of the first by more than `TIE`; float64 -> bool."""
    return second < first * (1 - TIE)
