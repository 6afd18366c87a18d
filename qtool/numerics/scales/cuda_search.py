"""Searches for the scales of single groups on CUDA devices, as Triton kernels; see `search` and `grids.scale_codes`.

A program takes some groups, a tile of them in registers, and goes through all trials.

Shape letters: N rows, C columns, G groups of W columns, E ends.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

TILE = 2048
"""Numbers of a program's groups, filled up."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 sum with it has no fraction, ties even."""
TINY = tl.constexpr(1e-36)
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def rounded(x, lowest, highest):  # type: ignore[no-untyped-def]
    """The integer nearest to x in [lowest, highest], ties even."""
    return (tl.minimum(tl.maximum(x, lowest), highest) + MAGIC) - MAGIC


@triton.jit
def tile_of(p, groups, period, width, block: tl.constexpr, count: tl.constexpr, by_row: tl.constexpr):  # type: ignore[no-untyped-def]
    """[count, block]: the numbers of this program's groups, from [groups, width], or [period, width] if not by row."""
    g = tl.program_id(0) * count + tl.arange(0, count)
    j = tl.arange(0, block)
    place = (g if by_row else g % period).to(tl.int64)
    return tl.load(p + place[:, None] * width + j[None, :], (g[:, None] < groups) & (j[None, :] < width), 0.0)


@triton.jit
def symmetric_kernel(  # type: ignore[no-untyped-def]
    x, weight, reach, ratios, scale, groups, period, width, lowest, highest, trials,
    block: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """See `search.symmetric_rows`."""
    v = tile_of(x, groups, period, width, block, count, True)
    w = tile_of(weight, groups, period, width, block, count, False)
    near = tl.max(tl.abs(v * tile_of(reach, groups, period, width, block, count, False)), 1)
    far = tl.max(tl.abs(v), 1)
    best, best_scale = tl.full([count], -1.0, tl.float32), tl.zeros([count], tl.float32)
    weighed = w * v
    for i in range(trials):
        t = i / (trials - 1.0)
        extent = far + (near - far) * t
        end = highest + (-lowest - highest) * t
        inverse = tl.where(near > TINY, end * tl.load(ratios + i) / tl.where(near > TINY, extent, 1.0), 0.0)
        scaled = v * inverse[:, None]
        level, minus = rounded(scaled, lowest, highest), rounded(scaled, -highest, -lowest)
        xl, ll = tl.sum(weighed * level, 1), tl.sum(w * level * level, 1)
        better = (ll > 0) & (xl * xl > best * ll)
        best, best_scale = tl.where(better, xl * xl / ll, best), tl.where(better, xl / ll, best_scale)
        xl, ll = tl.sum(weighed * minus, 1), tl.sum(w * minus * minus, 1)
        better = (ll > 0) & (xl * xl > best * ll)
        best, best_scale = tl.where(better, xl * xl / ll, best), tl.where(better, -xl / ll, best_scale)
    g = tl.program_id(0) * count + tl.arange(0, count)
    tl.store(scale + g, best_scale, g < groups)


@triton.jit
def zero_point_kernel(  # type: ignore[no-untyped-def]
    x, weight, reach, ratios, scale, zero, groups, period, width, lowest, highest, trials,
    block: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """See `search.zero_point_rows`."""
    v = tile_of(x, groups, period, width, block, count, True)
    w = tile_of(weight, groups, period, width, block, count, False)
    reached = v * tile_of(reach, groups, period, width, block, count, False)
    far_low, far_high = tl.minimum(tl.min(v, 1), 0.0), tl.maximum(tl.max(v, 1), 0.0)
    near_low, near_high = tl.minimum(tl.min(reached, 1), 0.0), tl.maximum(tl.max(reached, 1), 0.0)
    best, best_scale = tl.full([count], -1.0, tl.float32), tl.zeros([count], tl.float32)
    best_zero = tl.zeros([count], tl.float32)
    weighed, some = w * v, near_high - near_low > TINY
    for i in range(4 * trials):
        t = (i // 4) / (trials - 1.0)
        shift = tl.where(i % 2 == 0, -0.5, 0.5) * tl.where(i % 4 < 2, 1.0, 3.0)
        low, high = far_low + (near_low - far_low) * t, far_high + (near_high - far_high) * t
        inverse = tl.where(some, (highest - lowest) * tl.load(ratios + i // 4) / tl.where(some, high - low, 1.0), 0.0)
        middle = (lowest + highest) * 0.5 - (((low + high) * 0.5 * inverse + MAGIC) - MAGIC)
        z = rounded(middle + shift, lowest, highest)
        level = rounded(v * inverse[:, None], lowest - z[:, None], highest - z[:, None])
        xl, ll = tl.sum(weighed * level, 1), tl.sum(w * level * level, 1)
        better = (ll > 0) & (xl * xl > best * ll)
        best, best_scale = tl.where(better, xl * xl / ll, best), tl.where(better, xl / ll, best_scale)
        best_zero = tl.where(better, z, best_zero)
    g = tl.program_id(0) * count + tl.arange(0, count)
    tl.store(scale + g, best_scale, g < groups)
    tl.store(zero + g, best_zero, g < groups)


@triton.jit
def offset_kernel(  # type: ignore[no-untyped-def]
    x, weight, reach, ratios, scale, offset, groups, period, width, highest, trials,
    block: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """See `search.offset_rows`."""
    inside = (tl.arange(0, block) < width)[None, :]
    v = tile_of(x, groups, period, width, block, count, True)
    w = tile_of(weight, groups, period, width, block, count, False)
    r = tile_of(reach, groups, period, width, block, count, False)
    total = tl.sum(w, 1)
    mean = tl.where(total > 0, tl.sum(w * v, 1) / tl.where(total > 0, total, 1.0), 0.0)
    d = tl.where(inside, v - mean[:, None], 0.0)
    far_low, far_high = tl.min(tl.where(inside, d, float("inf")), 1), tl.max(tl.where(inside, d, float("-inf")), 1)
    near_low = tl.min(tl.where(inside, d * r, float("inf")), 1)
    near_high = tl.max(tl.where(inside, d * r, float("-inf")), 1)
    some = (near_high - near_low > TINY) & (far_high > far_low) & (total > 0)
    best, best_scale, best_offset = tl.full([count], -1.0, tl.float32), tl.zeros([count], tl.float32), mean
    for i in range(3 * trials):
        t = (i // 3) / (trials - 1.0)
        shift = tl.where(i % 3 == 0, 0.0, tl.where(i % 3 == 1, -0.3, 0.3))
        low, high = far_low + (near_low - far_low) * t, far_high + (near_high - far_high) * t
        inverse = highest * tl.load(ratios + i // 3) / tl.where(some, high - low, 1.0)
        anchor = (low + high) * 0.5 - highest * 0.5 / inverse + shift / inverse
        level = rounded((d - anchor[:, None]) * inverse[:, None], 0.0, highest)
        lsum, ll, xl = tl.sum(w * level, 1), tl.sum(w * level * level, 1), tl.sum(w * d * level, 1)
        spread = ll - lsum * lsum / tl.where(some, total, 1.0)
        better = some & (spread > 0) & (xl * xl > best * spread)
        best, best_scale = tl.where(better, xl * xl / spread, best), tl.where(better, xl / spread, best_scale)
        best_offset = tl.where(better, mean - xl / spread * lsum / total, best_offset)
    g = tl.program_id(0) * count + tl.arange(0, count)
    tl.store(scale + g, best_scale, g < groups)
    tl.store(offset + g, best_offset, g < groups)


@triton.jit
def code_kernel(  # type: ignore[no-untyped-def]
    x, weight, ends, values, found, groups, period, width, last, smallest, steps, highest, first_step, tried,
    some_ends: tl.constexpr, block: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """See `scale_codes.code_rows`."""
    v = tl.abs(tile_of(x, groups, period, width, block, count, True))
    w = tile_of(weight, groups, period, width, block, count, False)
    g = tl.program_id(0) * count + tl.arange(0, count)
    end = tl.load(ends + g * some_ends, g < groups, 1).to(tl.int32)
    unit = tl.load(values + tl.minimum(tl.maximum(end, 1), last))
    best, chosen = tl.full([count], -1.0, tl.float32), tl.full([count], 1, tl.int32)
    for i in range(some_ends * tried):
        end = tl.load(ends + g * some_ends + (some_ends - 1 - i // tried), g < groups, 1).to(tl.int32)
        code = tl.minimum(tl.maximum(end + first_step + i % tried, 1), last)
        value = tl.load(values + code)
        size = v / value[:, None]
        clipped = tl.minimum(size, highest)
        power = tl.maximum(clipped.to(tl.int32, bitcast=True) & EXPONENT, smallest)
        rounder = power.to(tl.float32, bitcast=True) * steps
        level = (clipped + rounder) - rounder
        ratio = value / unit
        gain = tl.sum(w * level * (size + size - level), 1) * (ratio * ratio)
        chosen = tl.where(gain > best, code, chosen)
        best = tl.maximum(best, gain)
    tl.store(found + g, chosen.to(tl.uint8), g < groups)


def prepared(
    x: Tensor, weight: Tensor, reach: Tensor, width: int
) -> tuple[tuple[Tensor, Tensor, Tensor], int, int, int, int]:
    """((x, weight, reach) as kernels read them, groups, groups of a row, W filled up, groups of a program)."""
    arrays = tuple(t.to(x.device, torch.float32).contiguous() for t in (x, weight, reach))
    block = max(16, next_power_of_2(width))
    return arrays, x.numel() // width, x.shape[1] // width, block, max(1, TILE // block)  # type: ignore[return-value]


@cache
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 numbers that are used again and again; copying them takes longer than a kernel."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def symmetric(
    x: Tensor, weight: Tensor, reach: Tensor, width: int, lowest: int, highest: int, ratios: np.ndarray
) -> Tensor:
    """Scales [N, G]; see `search.symmetric`, weight and reach [C] as it prepares them."""
    arrays, groups, period, block, count = prepared(x, weight, reach, width)
    scale = x.new_empty(len(x), period, dtype=torch.float32)
    tried = on_device(tuple(ratios.tolist()), x.device)
    symmetric_kernel[(cdiv(groups, count),)](
        *arrays, tried, scale, groups, period, width, float(lowest), float(highest), len(ratios), block, count
    )
    return scale


def zero_point(
    x: Tensor, weight: Tensor, reach: Tensor, width: int, lowest: int, highest: int, ratios: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, G]; see `search.zero_point`."""
    arrays, groups, period, block, count = prepared(x, weight, reach, width)
    scale, zero = x.new_empty(2, len(x), period, dtype=torch.float32)
    tried = on_device(tuple(ratios.tolist()), x.device)
    zero_point_kernel[(cdiv(groups, count),)](
        *arrays, tried, scale, zero, groups, period, width, float(lowest), float(highest), len(ratios), block, count
    )
    return scale, zero


def free_offset(
    x: Tensor, weight: Tensor, reach: Tensor, width: int, highest: int, ratios: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Scales and offsets [N, G]; see `search.free_offset`."""
    arrays, groups, period, block, count = prepared(x, weight, reach, width)
    scale, offset = x.new_empty(2, len(x), period, dtype=torch.float32)
    tried = on_device(tuple(ratios.tolist()), x.device)
    offset_kernel[(cdiv(groups, count),)](
        *arrays, tried, scale, offset, groups, period, width, float(highest), len(ratios), block, count
    )
    return scale, offset


def best_code(
    x: Tensor, weight: Tensor, ends: Tensor, values: Tensor, tried: tuple[int, int], rule: tuple[int, float, float]
) -> Tensor:
    """Codes of scales, uint8 [N, G]; see `scale_codes.best_code`.

    rule: bits of the smallest power of two, `ROUNDER` times the step between 1 and 2, the highest level.
    """
    width = x.shape[1] // ends.shape[1]
    arrays, groups, period, block, count = prepared(x, weight, weight, width)
    found = torch.empty(ends.shape[:2], dtype=torch.uint8, device=x.device)
    code_kernel[(cdiv(groups, count),)](
        *arrays[:2], ends.contiguous(), values.to(x.device), found, groups, period, width, len(values) - 1, *rule,
        tried[0], tried[1] - tried[0] + 1, ends.shape[2], block, count,
    )  # fmt: skip
    return found
