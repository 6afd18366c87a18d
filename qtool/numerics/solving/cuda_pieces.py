"""What the column walk and coordinate descent share on CUDA devices, as Triton functions.

Programs take some rows each. The columns that wait for each other stay in registers, a tile of P pieces of S columns:
inside a piece they go one by one, then what was done there goes to the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 8, 1
"""Rows of a program, and the warps that share them."""
BLOCK = 128
"""Columns of a tile; what lies beyond is updated by a matrix product."""
PIECE = 16
"""Columns that are gone through one by one."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 sum with it has no fraction, ties even."""


def apart(matrix: Tensor, rows: int, multiple: int) -> tuple[int, int]:
    """(how far matrices lie apart in memory, how many rows belong to each), for one of [K, K] or several, [M, K, K].

    Args:
        matrix: one or several.
        rows: of all.
        multiple: rows of a program, which belong to one matrix.
    """
    if matrix.dim() == 2:
        return 0, rows
    each = rows // len(matrix)
    assert each % multiple == 0
    return matrix.stride(0), each


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
def entry(x, i, place):  # type: ignore[no-untyped-def]
    """Row i of a tensor [S, rows] whose rows' numbers are `place` [S]."""
    return tl.sum(tl.where(place[:, None] == i, x, 0.0), 0)


@triton.jit
def piece_of(tile, p, pieces: tl.constexpr):  # type: ignore[no-untyped-def]
    """[S, rows]: piece p of a tile [P, S, rows]."""
    return tl.sum(tl.where(tl.arange(0, pieces)[:, None, None] == p, tile, 0.0), 0)


@triton.jit
def fed(tile, matrix, stride, first, last, e, inside, pieces: tl.constexpr, piece: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile [P, S, rows] less what errors e [S, rows] of columns from `first` on do to it.

    matrix: their rows of it, `stride` apart, begin at the tile's first column; columns from `last` on are none of its.
    inside: bool [P, S], which columns are touched.
    """
    column, j = tl.arange(0, pieces)[:, None] * piece + tl.arange(0, piece)[None, :], tl.arange(0, piece)
    for k in tl.static_range(piece):
        row = tl.load(matrix + (first + k) * stride + column, inside & (first + k < last), 0.0)
        tile -= row[:, :, None] * entry(e, k, j)[None, None, :]
    return tile
