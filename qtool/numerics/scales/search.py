"""Error-minimizing scales for integer grids: a sweep over clipping ratios, each closed by weighted least squares.

For every row and group of columns the searches minimize

    sum_j importance_j (x_j - s * l_j - o)^2        over s, o and integers l_j in [lowest, highest]

A candidate step rounds the group, then the best (s, o) for those codes follows in closed form, which is also how its
error is scored (the idea of ggml's make_qx_quants and make_qkx2_quants, https://github.com/ggml-org/llama.cpp, here
with a wider sweep, both signs of the scale, and integer zero points). Codes are rounded again to the final parameters
later.

Shape letters: N rows, C columns, G groups of C / G columns each.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import importances, searchable
from qtool.numerics.threads.parallel import over_rows

STEPS = 20
"""Clipping ratios tried per sign (symmetric) or per zero point (asymmetric)."""

TINY = np.float32(1e-36)
"""Largest range of a group that counts as zeros: the inverse of a step of less is infinite."""

FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}


class IntegerScales(NamedTuple):
    """How the scales of groups of columns are chosen for integers.

    Attributes:
        columns: of a group.
        lowest, highest: integers.
        zeros: whether there are integer zero points; see `zero_point`, else `symmetric`.
        dtype: that scales are rounded to.
    """

    columns: int
    lowest: int
    highest: int
    zeros: bool
    dtype: torch.dtype


@cache
def clip_ratios(levels: int, steps: int = STEPS) -> np.ndarray:
    """Where the largest weight may land, relative to the end of the grid: from short of it to beyond it (clipped).

    Coarse grids clip harder. The bounds enclose the optimum of normal, Laplace and Student-t groups of 16 to 4096
    weights at every width from 2 to 8 bits.
    """
    bits = math.log2(levels)
    return np.linspace(max(0.4, 0.85 - 1.0 / bits**2), 1.0 + 5.0 / bits**2, steps).astype(np.float32)


@njit(nogil=True, cache=True, inline="always")
def spans(v, reach, center):  # type: ignore[no-untyped-def]
    """(lowest, highest) of v - center, and of (v - center) * reach: where the sweep begins and ends."""
    low = high = v[0] - center
    near_low = near_high = low * reach[0]
    for j in range(1, len(v)):
        d = v[j] - center
        low, high = min(low, d), max(high, d)
        near_low, near_high = min(near_low, d * reach[j]), max(near_high, d * reach[j])
    return low, high, near_low, near_high


@njit(nogil=True, cache=True, inline="always")
def magnitude(x):  # type: ignore[no-untyped-def]
    """The bits of |x|, int32: they are ordered as the numbers are, and a maximum of integers is vectorized."""
    return np.int32(np.float32(x).view(np.int32) & np.int32(0x7FFFFFFF))


@njit(nogil=True, cache=True, fastmath=FAST)
def symmetric_rows(x, importance, reach, width, lowest, highest, ratios, scale, start, stop):  # type: ignore[no-untyped-def]
    """Fills scale [N, G] for rows start to stop. x [N, C]; importance, reach [C]."""
    lowest, highest = np.float32(lowest), np.float32(highest)
    for n in range(start, stop):
        for g in range(x.shape[1] // width):
            v, weight = x[n, g * width : (g + 1) * width], importance[g * width : (g + 1) * width]
            far_bits, near_bits = np.int32(0), np.int32(0)
            for j in range(width):
                far_bits = max(far_bits, magnitude(v[j]))
                near_bits = max(near_bits, magnitude(v[j] * reach[g * width + j]))
            far, near = np.int32(far_bits).view(np.float32), np.int32(near_bits).view(np.float32)
            best, best_scale = np.float32(-1.0), np.float32(0.0)
            for i in range(len(ratios) if near > TINY else 0):
                t = np.float32(i) / np.float32(len(ratios) - 1)
                end = highest + (-lowest - highest) * t
                inverse = end * ratios[i] / (far + (near - far) * t)
                xl, ll, xl_minus, ll_minus = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for j in range(width):
                    nearest = np.rint(v[j] * inverse)
                    level, minus = min(max(nearest, lowest), highest), min(max(nearest, -highest), -lowest)
                    xl += weight[j] * v[j] * level
                    ll += weight[j] * level * level
                    xl_minus += weight[j] * v[j] * minus
                    ll_minus += weight[j] * minus * minus
                if ll > 0 and xl * xl > best * ll:
                    best, best_scale = xl * xl / ll, xl / ll
                if ll_minus > 0 and xl_minus * xl_minus > best * ll_minus:
                    best, best_scale = xl_minus * xl_minus / ll_minus, -xl_minus / ll_minus
            scale[n, g] = best_scale


@njit(nogil=True, cache=True, fastmath=FAST)
def zero_point_rows(x, importance, reach, width, lowest, highest, ratios, scale, zero, start, stop):  # type: ignore[no-untyped-def]
    """Fills scale and integer-valued zero, [N, G], for rows start to stop. x [N, C]; importance, reach [C]."""
    lowest, highest, half = np.float32(lowest), np.float32(highest), np.float32(0.5)
    for n in range(start, stop):
        for g in range(x.shape[1] // width):
            v, weight = x[n, g * width : (g + 1) * width], importance[g * width : (g + 1) * width]
            far_low, far_high, near_low, near_high = spans(v, reach[g * width : (g + 1) * width], np.float32(0.0))
            far_low, near_low = min(np.float32(0.0), far_low), min(np.float32(0.0), near_low)
            far_high, near_high = max(np.float32(0.0), far_high), max(np.float32(0.0), near_high)
            best, best_scale, best_zero = np.float32(-1.0), np.float32(0.0), np.float32(0.0)
            if near_high - near_low > TINY:
                for i in range(len(ratios)):
                    t = np.float32(i) / np.float32(len(ratios) - 1)
                    low, high = far_low + (near_low - far_low) * t, far_high + (near_high - far_high) * t
                    inverse = (highest - lowest) * ratios[i] / (high - low)
                    middle = (lowest + highest) * half - np.rint((low + high) * half * inverse)
                    for shift in (-0.5, 0.5, -1.5, 1.5):
                        z = min(max(np.rint(middle + np.float32(shift)), lowest), highest)
                        xl, ll = np.float32(0.0), np.float32(0.0)
                        for j in range(width):
                            level = min(max(np.rint(v[j] * inverse), lowest - z), highest - z)
                            xl += weight[j] * v[j] * level
                            ll += weight[j] * level * level
                        if ll > 0 and xl * xl > best * ll:
                            best, best_scale, best_zero = xl * xl / ll, xl / ll, z
            scale[n, g], zero[n, g] = best_scale, best_zero


@njit(nogil=True, cache=True, fastmath=FAST)
def offset_rows(x, importance, reach, width, highest, ratios, scale, offset, start, stop):  # type: ignore[no-untyped-def]
    """Fills scale and free offset, [N, G], for levels 0 to highest and rows start to stop; the rest as above."""
    highest, half = np.float32(highest), np.float32(0.5)
    for n in range(start, stop):
        for g in range(x.shape[1] // width):
            v, weight = x[n, g * width : (g + 1) * width], importance[g * width : (g + 1) * width]
            total, mean = np.float32(0.0), np.float32(0.0)
            for j in range(width):
                total += weight[j]
                mean += weight[j] * v[j]
            mean = mean / total if total > 0 else np.float32(0.0)
            far_low, far_high, near_low, near_high = spans(v, reach[g * width : (g + 1) * width], mean)
            best, best_scale, best_offset = np.float32(-1.0), np.float32(0.0), mean
            if near_high - near_low > TINY and far_high > far_low and total > 0:
                for i in range(len(ratios)):
                    t = np.float32(i) / np.float32(len(ratios) - 1)
                    low, high = far_low + (near_low - far_low) * t, far_high + (near_high - far_high) * t
                    inverse = highest * ratios[i] / (high - low)
                    anchor = mean + (low + high) * half - highest * half / inverse
                    for shift in (0.0, -0.3, 0.3):
                        start_at = anchor + np.float32(shift) / inverse
                        lsum, ll, xl = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                        for j in range(width):
                            level = min(max(np.rint((v[j] - start_at) * inverse), np.float32(0.0)), highest)
                            lsum += weight[j] * level
                            ll += weight[j] * level * level
                            xl += weight[j] * (v[j] - mean) * level
                        spread = ll - lsum * lsum / total
                        if spread > 0 and xl * xl > best * spread:
                            best, best_scale = xl * xl / spread, xl / spread
                            best_offset = mean - best_scale * lsum / total
            scale[n, g], offset[n, g] = best_scale, best_offset


def prepared(x: Tensor, importance: Tensor | None, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 arrays on the CPU: x [N, C], importance [C], reach [C]; see `checks`, `relative` and `reach`."""
    columns, groups = x.shape[1], x.shape[1] // width
    weight = relative(importance, columns, groups).cpu()
    return searchable(x), weight.numpy(), reach(weight).numpy()


def weights(x: Tensor, importance: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """(importance [C], reach [C]) for kernels on the device of x [N, C]; see `relative` and `reach`."""
    weight = relative(importance, x.shape[1], x.shape[1] // width).to(x.device)
    return weight, reach(weight)


def relative(importance: Tensor | None, columns: int, groups: int) -> Tensor:
    """Importances over their group's mean, float32 [C]. Those of a group that are all zero count as all alike."""
    weight = importances(importance, columns).view(groups, -1)
    mean = weight.mean(1, keepdim=True)
    return torch.where(mean > 0, weight / torch.where(mean > 0, mean, 1.0), 1.0).flatten()


def reach(weight: Tensor) -> Tensor:
    """Shrinks columns that hardly count, float32 [C], factors up to 1.

    A sweep goes on to a range that covers only what is left, so that a large weight on a dead input does not set the
    step of its group. weight: see `relative`.
    """
    return weight.clamp_max(1.0).pow(0.25)


def symmetric(x: Tensor, importance: Tensor | None, width: int, lowest: int, highest: int) -> Tensor:
    """Scales for x ~ s * l, l in [lowest, highest]; either sign.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        width: columns per group; divides C.
        lowest: first level of the grid.
        highest: last level of the grid.

    Returns:
        float32 [N, G], on the device of x.
    """
    ratios = clip_ratios(highest - lowest + 1)
    if x.is_cuda:
        from qtool.numerics.scales import cuda_search

        return cuda_search.symmetric(x, *weights(x, importance, width), width, lowest, highest, ratios)
    values, weight, reach = prepared(x, importance, width)
    scale = np.zeros((x.shape[0], x.shape[1] // width), np.float32)
    over_rows(
        lambda a, b: symmetric_rows(values, weight, reach, width, lowest, highest, ratios, scale, a, b), len(values)
    )
    return torch.from_numpy(scale).to(x.device)


def zero_point(x: Tensor, importance: Tensor | None, width: int, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Scales and integer zero points for x ~ s * (q - z), q and z in [lowest, highest]; arguments as in `symmetric`."""
    ratios = clip_ratios(highest - lowest + 1)
    if x.is_cuda:
        from qtool.numerics.scales import cuda_search

        return cuda_search.zero_point(x, *weights(x, importance, width), width, lowest, highest, ratios)
    values, weight, reach = prepared(x, importance, width)
    scale, zero = (np.zeros((x.shape[0], x.shape[1] // width), np.float32) for _ in range(2))
    over_rows(
        lambda a, b: zero_point_rows(values, weight, reach, width, lowest, highest, ratios, scale, zero, a, b),
        len(values),
    )
    return torch.from_numpy(scale).to(x.device), torch.from_numpy(zero).to(x.device)


def free_offset(x: Tensor, importance: Tensor | None, width: int, highest: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets for x ~ s * l + o, l in [0, highest]; arguments as in `symmetric`."""
    ratios = clip_ratios(highest + 1)
    if x.is_cuda:
        from qtool.numerics.scales import cuda_search

        return cuda_search.free_offset(x, *weights(x, importance, width), width, highest, ratios)
    values, weight, reach = prepared(x, importance, width)
    scale, offset = (np.zeros((x.shape[0], x.shape[1] // width), np.float32) for _ in range(2))
    over_rows(lambda a, b: offset_rows(values, weight, reach, width, highest, ratios, scale, offset, a, b), len(values))
    return torch.from_numpy(scale).to(x.device), torch.from_numpy(offset).to(x.device)
