"""Normal equations of scales on CUDA devices, as a Triton kernel; see `normal.scale_by_scale`.

A program takes some rows and a group, and goes through the columns from there on: levels of the group times its rows of
the Gram matrix, times the levels there, summed group by group. Nothing larger than its result leaves the chip.

Shape letters: N rows, K columns, G groups, W columns of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from qtool.numerics.solving.cuda_pieces import apart

ROWS, COLUMNS = 64, 128
"""Rows of a program, and the columns that it takes at a time."""
PART = 32
"""Columns of its group that it takes at a time."""


@triton.jit
def fold_kernel(  # type: ignore[no-untyped-def]
    levels, gram, matrix_stride, gram_stride, normal, rows, each, k, size, groups,
    width: tl.constexpr, part: tl.constexpr, count: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Fills row and column g of normal [rows, size, size] from its diagonal up to G; levels [rows, k], gram [k, k].

    Every `each` rows have a Gram matrix of their own.
    """
    gram += (tl.program_id(0) * count // each).to(tl.int64) * matrix_stride
    n, g = tl.program_id(0) * count + tl.arange(0, count), tl.program_id(1)
    i, j, h = tl.arange(0, part), tl.arange(0, columns), tl.arange(0, columns // width)
    row, start = levels + n[:, None].to(tl.int64) * k, g * width
    matrix = normal + n[:, None].to(tl.int64) * size * size
    for first in range(start, k, columns):
        inside, seen = first + j < k, tl.zeros([count, columns], tl.float32)
        for a in tl.static_range(0, width, part):
            own = tl.load(row + start + a + i[None, :], n[:, None] < rows, 0.0)
            gram_rows = gram + (start + a + i[:, None]).to(tl.int64) * gram_stride + first + j[None, :]
            seen = tl.dot(own, tl.load(gram_rows, inside[None, :], 0.0), seen, input_precision="tf32x3")
        seen *= tl.load(row + first + j[None, :], (n[:, None] < rows) & inside[None, :], 0.0)
        total = tl.sum(tl.reshape(seen, [count, columns // width, width]), 2)
        other = first // width + h
        place = (n[:, None] < rows) & (other[None, :] < groups)
        tl.store(matrix + g * size + other[None, :], total, place)
        tl.store(matrix + other[None, :] * size + g, total, place)


def scale_by_scale(levels: Tensor, gram: Tensor, groups: int, normal: Tensor) -> None:
    """See `normal.scale_by_scale`; W is one of `normal.TILED`."""
    (n, k), width = levels.shape, levels.shape[1] // groups
    assert normal.is_contiguous()
    stride, each = apart(gram, n, ROWS)
    fold_kernel[(cdiv(n, ROWS), groups)](
        levels.contiguous(), gram, stride, gram.stride(-2), normal, n, each, k, normal.shape[1],
        groups, width, min(width, PART), ROWS, COLUMNS, num_stages=2,
    )  # fmt: skip
