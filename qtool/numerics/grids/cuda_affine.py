"""Rounding to `scale * level + offset` and back, and which of two choices leaves less, on CUDA devices.

Operations are rounded one by one, as on processors: results are those of `affine` and `compare`, but for the order in
which errors are summed in float64.

Shape letters: N rows, C columns, G groups of C / G columns, L levels, S blocks of C / S columns.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from qtool.numerics.solving.cuda_pieces import MAGIC

Levels = tuple[bool, np.float32, np.float32, np.int32, np.int32]
"""Fields of a `compare.Levels`."""

EXACT = {"enable_fp_fusion": False}
"""Sums of products that are rounded twice."""
TILE = 1024
"""Numbers that a program works on at a time."""
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def level_of(x, scale, offset, lowest, highest):  # type: ignore[no-untyped-def]
    """The nearest of consecutive integers to x in a group; that of 0 where there is no scale."""
    some = scale != 0
    y = tl.where(some, tl.div_rn(x - offset, tl.where(some, scale, 1.0)), 0.0)
    return tl.minimum(tl.maximum((y + MAGIC) - MAGIC, lowest), highest)


@triton.jit
def round_kernel(w, scale, offset, codes, columns, width, lowest, highest, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """`affine.round_rows`: a program fills a tile of a row of codes [N, C]. w [N, C]; scale, offset [N, G]."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    inside, g = j < columns, n * (columns // width) + j // width
    s, o = tl.load(scale + g, inside, 0.0), tl.load(offset + g, inside, 0.0)
    level = level_of(tl.load(w + n * columns + j, inside, 0.0), s, o, lowest, highest)
    tl.store(codes + n * columns + j, (level - lowest).to(tl.uint8), inside)


@triton.jit
def decode_kernel(codes, levels, scale, offset, w, columns, width, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """`affine.decode_rows`: a program fills a tile of a row of w [N, C]. levels [L]; the rest as above."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    inside, g = j < columns, n * (columns // width) + j // width
    level = tl.load(levels + tl.load(codes + n * columns + j, inside, 0).to(tl.int32))
    s, o = tl.load(scale + g, inside, 0.0), tl.load(offset + g, inside, 0.0)
    tl.store(w + n * columns + j, level * s + o, inside)


@triton.jit
def lack_of(x, scale, offset, lowest, highest, smallest, steps, floating: tl.constexpr):  # type: ignore[no-untyped-def]
    """What x lacks of its decoded level, float64; see `compare.exact_step_error` and `compare.exact_cast_error`."""
    if floating:
        some = scale != 0
        size = tl.abs(tl.where(some, tl.div_rn(x, tl.where(some, scale, 1.0)), 0.0))
        size = tl.minimum(size, highest)
        power = tl.maximum(size.to(tl.int32, bitcast=True) & EXPONENT, smallest)
        rounder = power.to(tl.float32, bitcast=True) * steps
        level, wanted = (size + rounder) - rounder, tl.abs(x)
    else:
        level, wanted = level_of(x, scale, offset, lowest, highest), x
    return (level * scale + offset).to(tl.float64) - wanted.to(tl.float64)


@triton.jit
def better_kernel(  # type: ignore[no-untyped-def]
    w, s, o, t, p, weight, better, blocks, per_row, columns, width, lowest, highest, smallest, steps, remaining,
    floating: tl.constexpr, count: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """`compare.better_rows`: fills better [N, S]. w [N, C]; s, o, t, p [N, G]; weight [C]; columns of a block."""
    b = tl.program_id(0) * count + tl.arange(0, count)
    place, groups = b.to(tl.int64), columns // width
    first, second = tl.zeros([count], tl.float64), tl.zeros([count], tl.float64)
    for start in range(0, columns, step):
        j = start + tl.arange(0, step)
        there = (b < blocks)[:, None] & (j < columns)[None, :]
        x = tl.load(w + place[:, None] * columns + j[None, :], there, 0.0)
        m = tl.load(weight + (b % per_row)[:, None] * columns + j[None, :], there, 0.0).to(tl.float64)
        g = place[:, None] * groups + (j // width)[None, :]
        a, c = tl.load(s + g, there, 0.0), tl.load(o + g, there, 0.0)
        e = lack_of(x, a, c, lowest, highest, smallest, steps, floating)
        a, c = tl.load(t + g, there, 0.0), tl.load(p + g, there, 0.0)
        f = lack_of(x, a, c, lowest, highest, smallest, steps, floating)
        first += tl.sum(m * e * e, 1)
        second += tl.sum(m * f * f, 1)
    tl.store(better + b, (second < first * tl.load(remaining)).to(tl.uint8), b < blocks)


def tiles(shape: torch.Size) -> tuple[tuple[int, int], int]:
    """(programs, numbers of each) for a matrix [N, C]."""
    tile = min(TILE, next_power_of_2(shape[1]))
    return (shape[0], cdiv(shape[1], tile)), tile


def round_to_levels(w: Tensor, scale: Tensor, offset: Tensor, lowest: float, highest: float) -> Tensor:
    """Codes, uint8 [N, C]; see `affine.round_to_levels`."""
    codes, (programs, tile) = torch.empty(w.shape, dtype=torch.uint8, device=w.device), tiles(w.shape)
    numbers = [t.float().contiguous() for t in (w, scale, offset)]
    if codes.numel():
        width = w.shape[1] // scale.shape[1]
        round_kernel[programs](*numbers, codes, w.shape[1], width, lowest, highest, tile, **EXACT)
    return codes


def decode_levels(codes: Tensor, levels: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """float32 [N, C]; see `affine.decode_levels`."""
    w, (programs, tile) = torch.empty(codes.shape, device=codes.device), tiles(codes.shape)
    if codes.numel():
        numbers = [t.float().contiguous() for t in (levels, scale, offset)]
        width = codes.shape[1] // scale.shape[1]
        decode_kernel[programs](codes.contiguous(), *numbers, w, codes.shape[1], width, tile, **EXACT)
    return w


def better_blocks(
    w: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    levels: Levels,
    weight: Tensor,
    blocks: int,
    rule: tuple[float, float],
) -> Tensor:
    """Where a second choice is better, bool [N, S]; see `compare.better_blocks`.

    rule: the share of an error from which on another one is no better, and what floats are rounded with.
    """
    floating, lowest, highest, smallest, _ = levels
    columns, count = w.shape[1] // blocks, len(w) * blocks
    step = min(TILE, max(16, next_power_of_2(columns)))
    several = TILE // step
    better = torch.empty(len(w), blocks, dtype=torch.uint8, device=w.device)
    numbers = [t.to(w.device, torch.float32).contiguous() for t in (w, *first, *second, weight)]
    remaining = torch.tensor([rule[0]], dtype=torch.float64, device=w.device)
    better_kernel[(cdiv(count, several),)](
        *numbers, better, count, blocks, columns, w.shape[1] // first[0].shape[1], float(lowest), float(highest),
        int(smallest), rule[1], remaining, floating, several, step, **EXACT,
    )  # fmt: skip
    return better.bool()
