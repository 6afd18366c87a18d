"""The column walk and coordinate descent on CUDA devices, as Triton kernels; see `walk` and `descent`.

Programs take some rows each. The block of columns that wait for each other stays in registers; what lies beyond it is
updated once per block by a matrix product.

Shape letters: N rows, K columns, B columns of a block, G groups, L levels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

ROWS, WARPS = 16, 1
"""Rows of a program, and the warps that share them."""
BLOCK = 128
"""Columns that descent takes before it updates the rest."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 sum with it has no fraction, ties even."""


@triton.jit
def nearest(x, middles, step: tl.constexpr):  # type: ignore[no-untyped-def]
    """Indices of the levels nearest to x, by bisection; middles is filled up with infinity, 2 `step` - 1 of them."""
    code = tl.zeros(x.shape, tl.int32)
    size: tl.constexpr = step
    for i in tl.static_range(8):
        if (size >> i) > 0:
            code += tl.where(x > tl.load(middles + code + (size >> i) - 1), size >> i, 0)
    return code


@triton.jit
def walk_kernel(  # type: ignore[no-untyped-def]
    w, factor, factor_stride, scale, offset, levels, middles, codes, error,
    rows, columns, lowest, highest, step: tl.constexpr, block: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """`walk.walk_rows`: w, scale, offset, codes and error are [columns, rows]; step: see `nearest`, 0 for integers."""
    n = tl.program_id(0) * count + tl.arange(0, count)
    i = tl.arange(0, block)
    tile = tl.load(w + i[:, None] * rows + n[None, :], (i[:, None] < columns) & (n[None, :] < rows), 0.0)
    for j in range(columns):
        x = tl.sum(tl.where(i[:, None] == j, tile, 0.0), 0)
        s = tl.load(scale + j * rows + n, n < rows, 0.0)
        o = tl.load(offset + j * rows + n, n < rows, 0.0)
        u = tl.load(factor + j * factor_stride + i, (i >= j) & (i < columns), 0.0)
        quotient = tl.where(s == 0, lowest, (x - o) / tl.where(s == 0, 1.0, s))
        if step == 0:
            level = (tl.minimum(tl.maximum(quotient, lowest), highest) + MAGIC) - MAGIC
            code = (level - lowest).to(tl.int32)
        else:
            code = nearest(quotient, middles, step)
            level = tl.load(levels + code)
        e = (x - (s * level + o)) / tl.load(factor + j * factor_stride + j)
        tl.store(codes + j * rows + n, code.to(tl.uint8), n < rows)
        tl.store(error + j * rows + n, e, n < rows)
        tile -= u[:, None] * e[None, :]


def walk_block(
    w: Tensor,
    factor: Tensor,
    scale: Tensor,
    offset: Tensor,
    levels: Tensor,
    middles: Tensor,
    ends: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """(codes, errors), [B, N] each, of one block; see `walk.walk_rows`.

    Args:
        w: float32 [B, N].
        factor: float32 [B, B].
        scale: float32 [B, N].
        offset: float32 [B, N].
        levels: float32 [L].
        middles: see `walk.nearest`; empty for consecutive integers.
        ends: the first and the last of consecutive integers.
    """
    columns, rows = w.shape
    codes, error = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    walk_kernel[(cdiv(rows, ROWS),)](
        w, factor, factor.stride(0), scale.contiguous(), offset.contiguous(), levels, middles, codes, error,
        rows, columns, *ends, (len(middles) + 1) // 2, next_power_of_2(columns), ROWS, num_warps=WARPS,
    )  # fmt: skip
    return codes, error


@triton.jit
def descent_kernel(  # type: ignore[no-untyped-def]
    gram, gram_stride, scale, levels, middles, codes, pull, steps, first,
    rows, columns, width, lowest, highest, uniform: tl.constexpr, step: tl.constexpr, block: tl.constexpr,
    count: tl.constexpr,
):  # fmt: skip
    """Descends over columns `first` to first + columns of codes and pull [K, rows]; fills steps [columns, rows].

    The pull is updated within these columns only. scale [rows' groups, rows], for `width` columns each.
    """
    n = tl.program_id(0) * count + tl.arange(0, count)
    i = tl.arange(0, block)
    inside = (i[:, None] < columns) & (n[None, :] < rows)
    place = (first + i[:, None]) * rows + n[None, :]
    tile = tl.load(pull + place, inside, 0.0)
    start = tl.load(levels + tl.load(codes + place, inside, 0).to(tl.int32))
    for j in range(columns):
        s = tl.load(scale + ((first + j) // width) * rows + n, n < rows, 0.0)
        row = tl.load(gram + (first + j) * gram_stride + first + i, i < columns, 0.0)
        slope = tl.load(gram + (first + j) * (gram_stride + 1)) * s
        alive = (tl.abs(slope) > 1e-36) & (slope * s > 0)
        p = tl.sum(tl.where(i[:, None] == j, tile, 0.0), 0)
        level = tl.sum(tl.where(i[:, None] == j, start, 0.0), 0)
        wish = level + tl.where(alive, p / tl.where(alive, slope, 1.0), 0.0)
        if uniform:
            found = (tl.minimum(tl.maximum(wish, lowest), highest) + MAGIC) - MAGIC
            code = (found - lowest).to(tl.int32)
        else:
            code = nearest(wish, middles, step)
            found = tl.load(levels + code)
        change = tl.where(alive, s * (found - level), 0.0)
        tl.store(codes + (first + j) * rows + n, code.to(tl.uint8), (n < rows) & alive)
        tl.store(steps + j * rows + n, change, n < rows)
        tile -= row[:, None] * change[None, :]
    tl.store(pull + place, tile, inside)


def descend(
    gram: Tensor, scale: Tensor, levels: Tensor, middles: Tensor, codes: Tensor, pull: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """See `descent.descend`; middles: between the levels, filled up for `nearest`."""
    (rows, k), width = codes.shape, codes.shape[1] // scale.shape[1]
    better, gradient, scales = codes.T.contiguous(), pull.T.contiguous(), scale.T.contiguous()
    table, between = levels.to(codes.device), middles.to(codes.device)
    lowest, highest = float(levels[0]), float(levels[-1])
    uniform = highest - lowest == len(levels) - 1 and lowest.is_integer()
    steps = gradient.new_empty(min(BLOCK, k), rows)
    for _ in range(sweeps):
        for a in range(0, k, BLOCK):
            columns = min(BLOCK, k - a)
            descent_kernel[(cdiv(rows, ROWS),)](
                gram, gram.stride(0), scales, table, between, better, gradient, steps, a,
                rows, columns, width, lowest, highest, uniform, (len(middles) + 1) // 2,
                BLOCK, ROWS, num_warps=WARPS,
            )  # fmt: skip
            b, moved = a + columns, steps[:columns]
            gradient[:a].addmm_(gram[:a, a:b], moved, alpha=-1)
            gradient[b:].addmm_(gram[b:, a:b], moved, alpha=-1)
    return better.T.contiguous(), gradient.T.contiguous()
