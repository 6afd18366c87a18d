"""Free scales and minima of single groups on CUDA devices, as Triton functions; see `sweep`, whose steps these are.

x and w are tiles [groups, W] of weights and of the importance of their squared errors.

Shape letters: W columns of a group, T trials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.numerics.scales.cuda_search import rounded

EPSILON = tl.constexpr(1e-15)


@triton.jit
def half(x):  # type: ignore[no-untyped-def]
    """The fp16 number nearest to x."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def extreme_of(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value that is largest in size, with its sign."""
    low, high = tl.minimum(tl.min(x, axis), 0.0), tl.maximum(tl.max(x, axis), 0.0)
    return tl.where(high > -low, high, low)


@triton.jit
def group_error(x, w, scale, offset, lowest, highest):  # type: ignore[no-untyped-def]
    """Weighted squared error of each group after rounding."""
    inverse = tl.where(scale != 0, 1.0 / tl.where(scale != 0, scale, 1.0), 0.0)
    d = x - offset[:, None]
    error = d - scale[:, None] * rounded(d * inverse[:, None], lowest, highest)
    return tl.sum(w * error * error, 1)


@triton.jit
def sweep_offset(x, w, total, mean, low, high, table, trials, highest):  # type: ignore[no-untyped-def]
    """(gain, curvature, sum w l (x - mean), sum w l) of each group's best trial; see `sweep.sweep_offset`."""
    middle, factor = (low + high) / 2, highest / tl.where(high > low, high - low, 1.0)
    y, centered = (x - middle[:, None]) * factor[:, None], w * (x - mean[:, None])
    best, best_ll, best_xl, best_l = total * 0 - 1, total * 0, total * 0, total * 0
    for t in range(trials):
        level = rounded(y * tl.load(table + t) + tl.load(table + trials + t), 0.0, highest)
        weighed = w * level
        lsum, xl = tl.sum(weighed, 1), tl.sum(centered * level, 1)
        ll = tl.sum(weighed * level, 1) - lsum * lsum / total
        gain = xl * xl / tl.maximum(ll, EPSILON)
        better = gain > best
        best, best_ll = tl.where(better, gain, best), tl.where(better, ll, best_ll)
        best_xl, best_l = tl.where(better, xl, best_xl), tl.where(better, lsum, best_l)
    return best, best_ll, best_xl, best_l


@triton.jit
def free_offset(x, w, r, near, table, trials, highest):  # type: ignore[no-untyped-def]
    """(scale, offset <= 0, curvature, mean level, sum w) of each group; see `sweep.free_offset`."""
    total, mean = tl.sum(w, 1), tl.sum(w * x, 1)
    mean = mean / total
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.max(x, 1)
    near_low, near_high = tl.minimum(tl.min(x * r, 1), 0.0), tl.max(x * r, 1)
    gain, ll, xl, lsum = sweep_offset(x, w, total, mean, low, high, table, trials, highest)
    again = (near_high - near_low > 0) & (near_high - near_low < near * (high - low))
    if tl.sum(again.to(tl.int32)) > 0:
        more, more_ll, more_xl, more_l = sweep_offset(x, w, total, mean, near_low, near_high, table, trials, highest)
        better = again & (more > gain)
        ll, xl, lsum = tl.where(better, more_ll, ll), tl.where(better, more_xl, xl), tl.where(better, more_l, lsum)
    some = high > low
    scale = tl.where(some, xl / tl.maximum(ll, EPSILON), 0.0)
    level = tl.where(some, lsum / total, 0.0)
    return scale, tl.minimum(mean - scale * level, 0.0), tl.where(some, ll, 0.0), level, total


@triton.jit
def sweep_scale(x, w, factor, table, trials, lowest, highest):  # type: ignore[no-untyped-def]
    """(gain, sum w l^2, sum w l x) of each group's best trial; see `sweep.sweep_scale`."""
    y, weighed = x * factor[:, None], w * x
    best, best_ll, best_xl = factor * 0 - 1, factor * 0, factor * 0
    for t in range(trials):
        level = rounded(y * tl.load(table + t), lowest, highest)
        ll, xl = tl.sum(w * level * level, 1), tl.sum(weighed * level, 1)
        gain = xl * xl / tl.maximum(ll, EPSILON)
        better = gain > best
        best, best_ll, best_xl = (
            tl.where(better, gain, best),
            tl.where(better, ll, best_ll),
            tl.where(better, xl, best_xl),
        )
    return best, best_ll, best_xl


@triton.jit
def free_scale(x, w, r, near, table, trials, lowest, highest):  # type: ignore[no-untyped-def]
    """(scale, curvature) of each group; see `sweep.free_scale`."""
    extreme, largest = extreme_of(x, 1), tl.max(tl.abs(x) * r, 1)
    some = tl.abs(extreme) >= EPSILON
    gain, ll, xl = sweep_scale(x, w, lowest / tl.where(some, extreme, 1.0), table, trials, lowest, highest)
    again = some & (largest > EPSILON) & (largest < near * tl.abs(extreme))
    if tl.sum(again.to(tl.int32)) > 0:
        factor = lowest / tl.where(again, largest, 1.0)
        more, more_ll, more_xl = sweep_scale(x, w, factor, table, trials, lowest, highest)
        better = again & (more > gain)
        ll, xl = tl.where(better, more_ll, ll), tl.where(better, more_xl, xl)
    return tl.where(some, xl / tl.where(ll > 0, ll, 1.0), 0.0), tl.where(some, ll, 0.0)
