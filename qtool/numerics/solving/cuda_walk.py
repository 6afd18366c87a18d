"""The column walk on CUDA devices, as Triton kernels; see `walk` and `cuda_pieces`.

Shape letters: N rows, K columns, B columns of a block, G groups, W columns of a group, L levels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from qtool.numerics.grids.minifloat import ROUNDER
from qtool.numerics.grids.scale_codes import CodedScales
from qtool.numerics.solving.cuda_pieces import BLOCK, MAGIC, PIECE, ROWS, WARPS, entry, fed, nearest, piece_of

EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def walk_kernel(  # type: ignore[no-untyped-def]
    w, factor, factor_stride, scale, offset, levels, middles, codes, error,
    rows, columns, lowest, highest, step: tl.constexpr, pieces: tl.constexpr, piece: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """`walk.walk_rows`: w, scale, offset, codes and error are [columns, rows]; step: see `nearest`, 0 for integers."""
    n = tl.program_id(0) * count + tl.arange(0, count)
    j, column = tl.arange(0, piece), tl.arange(0, pieces)[:, None] * piece + tl.arange(0, piece)[None, :]
    inside = (column[:, :, None] < columns) & (n[None, None, :] < rows)
    tile = tl.load(w + column[:, :, None] * rows + n[None, None, :], inside, 0.0)
    for p in range((columns + piece - 1) // piece):
        first = p * piece
        x, e = piece_of(tile, p, pieces), tl.zeros([piece, count], tl.float32)
        for k in range(tl.minimum(piece, columns - first)):
            here = entry(x, k, j)
            s = tl.load(scale + (first + k) * rows + n, n < rows, 0.0)
            o = tl.load(offset + (first + k) * rows + n, n < rows, 0.0)
            row = factor + (first + k) * factor_stride + first
            u = tl.load(row + j, (j > k) & (first + j < columns), 0.0)
            quotient = tl.where(s == 0, lowest, (here - o) / tl.where(s == 0, 1.0, s))
            if step == 0:
                level = (tl.minimum(tl.maximum(quotient, lowest), highest) + MAGIC) - MAGIC
                code = (level - lowest).to(tl.int32)
            else:
                code = nearest(quotient, middles, step)
                level = tl.load(levels + code)
            here = (here - (s * level + o)) / tl.load(row + k)
            tl.store(codes + (first + k) * rows + n, code.to(tl.uint8), n < rows)
            e = tl.where(j[:, None] == k, here[None, :], e)
            x -= u[:, None] * here[None, :]
        tl.store(
            error + (first + j[:, None]) * rows + n[None, :], e, (first + j[:, None] < columns) & (n[None, :] < rows)
        )
        later = (column >= first + piece) & (column < columns)
        tile = fed(tile, factor, factor_stride, first, columns, e, later, pieces, piece)


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
        rows, columns, *ends, (len(middles) + 1) // 2, next_power_of_2(cdiv(columns, PIECE)), PIECE, ROWS,
        num_warps=WARPS,
    )  # fmt: skip
    return codes, error


@triton.jit
def e4m3_code(x):  # type: ignore[no-untyped-def]
    """Bit patterns of the E4M3 numbers nearest to x >= 0, at most 448."""
    x = tl.minimum(x, 448.0)
    power = tl.maximum(x.to(tl.int32, bitcast=True) & EXPONENT, 121 << 23)  # 2^-6, below which steps stay as they are
    rounder = power.to(tl.float32, bitcast=True) * 1572864.0  # 1.5 * 2^23 steps of an eighth
    whole = (x + rounder) - rounder
    bits = whole.to(tl.int32, bitcast=True)
    return tl.where(whole < 0.015625, (whole * 512.0).to(tl.int32), (bits >> 20) - (120 << 3))


@triton.jit
def scale_code(  # type: ignore[no-untyped-def]
    x, weight, reach, values, last, unit, smallest, steps, highest, exponent, first_step, tried, empty,
    powers: tl.constexpr,
):  # fmt: skip
    """Codes of the best scales of groups x [W, rows]; weight and reach [W]. See `scale_codes.code_rows`."""
    size = tl.abs(x)
    far, near = tl.max(size, 0), tl.max(size * reach[:, None], 0)
    if powers:
        far_code, near_code = (
            (far.to(tl.int32, bitcast=True) >> 23) - exponent,
            (near.to(tl.int32, bitcast=True) >> 23) - exponent,
        )
    else:
        far_code, near_code = e4m3_code(far / highest / unit), e4m3_code(near / highest / unit)
    far_code, near_code = tl.minimum(tl.maximum(far_code, 0), last), tl.minimum(tl.maximum(near_code, 0), last)
    base = tl.load(values + tl.maximum(far_code, 1))
    best, chosen = far * 0 - 1, far_code * 0 + 1
    for i in range(2 * tried):
        end = tl.where(i < tried, near_code, far_code)
        code = tl.minimum(tl.maximum(end + first_step + i % tried, 1), last)
        value = tl.load(values + code)
        ratio = value / base
        y = size / value[None, :]
        clipped = tl.minimum(y, highest)
        power = tl.maximum(clipped.to(tl.int32, bitcast=True) & EXPONENT, smallest)
        rounder = power.to(tl.float32, bitcast=True) * steps
        level = (clipped + rounder) - rounder
        gain = tl.sum(weight[:, None] * level * (y + y - level), 0) * (ratio * ratio)
        chosen = tl.where(gain > best, code, chosen)
        best = tl.maximum(best, gain)
    return tl.where(far > 0, chosen, empty)


@triton.jit
def coded_kernel(  # type: ignore[no-untyped-def]
    w, factor, factor_stride, weights, reaches, values, levels, middles, codes, error, found,
    rows, columns, last, unit, smallest, steps, highest, exponent, first_step, tried, empty,
    powers: tl.constexpr, step: tl.constexpr, pieces: tl.constexpr, piece: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """`walk_kernel` that chooses the scale of each piece, a group, when it gets there; fills found [groups, rows]."""
    n = tl.program_id(0) * count + tl.arange(0, count)
    j, column = tl.arange(0, piece), tl.arange(0, pieces)[:, None] * piece + tl.arange(0, piece)[None, :]
    inside = (column[:, :, None] < columns) & (n[None, None, :] < rows)
    tile = tl.load(w + column[:, :, None] * rows + n[None, None, :], inside, 0.0)
    for p in range(columns // piece):
        first = p * piece
        x, e = piece_of(tile, p, pieces), tl.zeros([piece, count], tl.float32)
        weight, reach = tl.load(weights + first + j), tl.load(reaches + first + j)
        chosen = scale_code(
            x, weight, reach, values, last, unit, smallest, steps, highest, exponent, first_step, tried, empty, powers
        )
        tl.store(found + p * rows + n, chosen.to(tl.uint8), n < rows)
        s = tl.load(values + chosen)
        for k in range(piece):
            here = entry(x, k, j)
            row = factor + (first + k) * factor_stride + first
            u = tl.load(row + j, j > k, 0.0)
            code = nearest(here / s, middles, step)
            here = (here - s * tl.load(levels + code)) / tl.load(row + k)
            tl.store(codes + (first + k) * rows + n, code.to(tl.uint8), n < rows)
            e = tl.where(j[:, None] == k, here[None, :], e)
            x -= u[:, None] * here[None, :]
        tl.store(error + (first + j[:, None]) * rows + n[None, :], e, n[None, :] < rows)
        later = (column >= first + piece) & (column < columns)
        tile = fed(tile, factor, factor_stride, first, columns, e, later, pieces, piece)


def walk_coded(
    w: Tensor, factor: Tensor, levels: Tensor, middles: Tensor, rule: CodedScales, weight: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """GPTQ's walk where the scale of each group is a code that is searched when the walk gets there.

    Args:
        w: float32 [N, K], columns in walking order, those of a group side by side.
        factor: float32 [K, K], U of `linalg.inverse_factor`, in the same order.
        levels: float32 [L].
        middles: between them; see `walk.nearest`.
        rule: how scales are chosen.
        weight: float32 [K], see `search.relative`, in the same order.
        reach: float32 [K], of them.

    Returns:
        Codes, uint8 [N, K], in walking order, and codes of scales, uint8 [N, G].
    """
    rest, width = w.T.contiguous(), rule.columns
    (k, rows), pieces = rest.shape, max(1, BLOCK // width)
    codes, error = torch.empty_like(rest, dtype=torch.uint8), rest.new_empty(pieces * width, rows)
    found = codes.new_empty(k // width, rows)
    smallest, mantissa, highest = rule.grid.numbers
    numbers = rule.unit, int(smallest), float(ROUNDER) * 2.0 ** -int(mantissa), float(highest), rule.grid.exponent
    tried = rule.tried[0], rule.tried[1] - rule.tried[0] + 1
    values = rule.values.to(w.device)
    for a in range(0, k, len(error)):
        b = min(a + len(error), k)
        coded_kernel[(cdiv(rows, ROWS),)](
            rest[a:b], factor[a:b, a:b], factor.stride(0), weight[a:b], reach[a:b], values, levels, middles,
            codes[a:b], error, found[a // width : b // width], rows, b - a, len(values) - 1, *numbers, *tried,
            rule.empty, rule.powers, (len(middles) + 1) // 2, pieces, width, ROWS, num_warps=WARPS,
        )  # fmt: skip
        rest[b:].addmm_(factor[a:b, b:].T, error[: b - a], alpha=-1)
    return codes.T, found.T
