"""Coordinate descent on CUDA devices, as a Triton kernel; see `descent` and `cuda_pieces`.

Shape letters: N rows, K columns, B columns of a block, G groups, L levels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from qtool.numerics.solving.cuda_pieces import BLOCK, MAGIC, PIECE, ROWS, WARPS, apart, entry, fed, nearest, piece_of
from qtool.numerics.solving.split import Split


@triton.jit
def descent_kernel(  # type: ignore[no-untyped-def]
    gram, matrix_stride, gram_stride, scale, levels, middles, codes, pull, steps, first,
    rows, each, columns, width, lowest, highest, uniform: tl.constexpr, step: tl.constexpr, pieces: tl.constexpr,
    piece: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """Descends over columns `first` to first + columns of codes and pull [K, rows]; fills steps [columns, rows].

    The pull is updated within these columns only. scale [rows' groups, rows], for `width` columns each.
    Every `each` rows have a Gram matrix of their own.
    """
    n = tl.program_id(0) * count + tl.arange(0, count)
    j, column = tl.arange(0, piece), tl.arange(0, pieces)[:, None] * piece + tl.arange(0, piece)[None, :]
    gram += (tl.program_id(0) * count // each).to(tl.int64) * matrix_stride + first * gram_stride + first
    inside = (column[:, :, None] < columns) & (n[None, None, :] < rows)
    place = (first + column[:, :, None]) * rows + n[None, None, :]
    tile = tl.load(pull + place, inside, 0.0)
    for p in range((columns + piece - 1) // piece):
        start = p * piece
        some = (start + j[:, None] < columns) & (n[None, :] < rows)
        here = (first + start + j[:, None]) * rows + n[None, :]
        x, code = piece_of(tile, p, pieces), tl.load(codes + here, some, 0).to(tl.int32)
        level = tl.load(levels + code)
        scales = tl.load(scale + ((first + start + j[:, None]) // width) * rows + n[None, :], some, 0.0)
        moves = tl.zeros([piece, count], tl.float32)
        for k in range(tl.minimum(piece, columns - start)):
            row = tl.load(gram + (start + k) * gram_stride + start + j, start + j < columns, 0.0)
            s, was = entry(scales, k, j), entry(level, k, j)
            slope = tl.load(gram + (start + k) * (gram_stride + 1)) * s
            curved = (tl.abs(slope) > 1e-36) & (slope * s > 0)
            wish = was + tl.where(curved, entry(x, k, j) / tl.where(curved, slope, 1.0), 0.0)
            if uniform:
                found = (tl.minimum(tl.maximum(wish, lowest), highest) + MAGIC) - MAGIC
                better = (found - lowest).to(tl.int32)
            else:
                better = nearest(wish, middles, step)
                found = tl.load(levels + better)
            change = tl.where(curved, s * (found - was), 0.0)
            code = tl.where((j[:, None] == k) & curved[None, :], better[None, :], code)
            moves = tl.where(j[:, None] == k, change[None, :], moves)
            x -= row[:, None] * change[None, :]
        tl.store(codes + here, code.to(tl.uint8), some)
        tl.store(steps + (start + j[:, None]) * rows + n[None, :], moves, some)
        tile = fed(tile, gram, gram_stride, start, columns, moves, column < columns, pieces, piece)
    tl.store(pull + place, tile, inside)


def descend(
    curvature: Split, scale: Tensor, levels: Tensor, middles: Tensor, codes: Tensor, pull: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """See `descent.descend`; middles: between the levels, filled up for `nearest`."""
    (rows, k), width = codes.shape, codes.shape[1] // scale.shape[1]
    better, gradient, scales = codes.T.contiguous(), pull.T.contiguous(), scale.T.contiguous()
    table, between, gram = levels.to(codes.device), middles.to(codes.device), curvature.matrix
    lowest, highest = float(levels[0]), float(levels[-1])
    uniform = highest - lowest == len(levels) - 1 and lowest.is_integer()
    steps = gradient.new_empty(min(BLOCK, k), rows)
    stride, each = apart(gram, rows, ROWS)
    for _ in range(sweeps):
        for a in range(0, k, BLOCK):
            columns = min(BLOCK, k - a)
            descent_kernel[(cdiv(rows, ROWS),)](
                gram, stride, gram.stride(-2), scales, table, between, better, gradient, steps, a,
                rows, each, columns, width, lowest, highest, uniform, (len(middles) + 1) // 2,
                BLOCK // PIECE, PIECE, ROWS, num_warps=WARPS,
            )  # fmt: skip
            b, moved = a + columns, steps[:columns]
            curvature.subtract(gradient[:a], slice(0, a), slice(a, b), moved)
            curvature.subtract(gradient[b:], slice(b, k), slice(a, b), moved)
    return better.T.contiguous(), gradient.T.contiguous()
