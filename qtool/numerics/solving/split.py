"""Products of float32 matrices on the units of a CUDA device that multiply bfloat16 numbers.

Each factor is the sum of two bfloat16 matrices, which keep 16 bits of it; of the four products the smallest is left
out. That is several times as fast as float32, and an error of about 2^-16 of the factors.

Several matrices of one size may lie side by side, [M, K, K]: then of what they are multiplied with, or what is solved
for them, each has as many rows, those of the first matrix first.

Shape letters: M matrices, K columns, N rows of all, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.solving.gram import FUSED


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is nearly x, the larger first."""
    high = x.bfloat16()
    low = torch.empty_like(high)
    torch.sub(x, high, out=low)
    return high, low


def subtract_product(total: Tensor, matrix: Tensor, x: Tensor) -> None:
    """Takes matrix @ x off a total: total float32 [C, N], matrix [C, B] or [M, C, B], x [B, N]."""
    if matrix.dim() == 2:
        total.addmm_(matrix, x, alpha=-1)
        return
    parts = [t.view(len(t), len(matrix), t.shape[1] // len(matrix)).transpose(0, 1) for t in (total, x)]
    parts[0].baddbmm_(matrix, parts[1], alpha=-1)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix: x [N, B], matrix [B, C] or [M, B, C] -> [N, C]."""
    return x @ matrix if matrix.dim() == 2 else (x.view(len(matrix), -1, x.shape[1]) @ matrix).flatten(0, 1)


def subtract_times(total: Tensor, x: Tensor, matrix: Tensor) -> None:
    """Takes `times(x, matrix)` off a total, float32 [N, C]."""
    if matrix.dim() == 2:
        total.addmm_(x, matrix, alpha=-1)
        return
    parts = [t.view(len(matrix), -1, t.shape[1]) for t in (total, x)]
    parts[0].baddbmm_(parts[1], matrix, alpha=-1)


SMALL = 2048
"""Columns up to which products take no longer in float32 than their factors to be split."""


class Split:
    """A matrix that many others are multiplied with.

    Args:
        matrix: float32 [K, K], or several small ones.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.halves = halves(matrix) if matrix.is_cuda and FUSED and matrix.shape[-1] > SMALL else None

    def subtract(self, total: Tensor, rows: slice, columns: slice, x: Tensor) -> None:
        """Takes matrix[rows, columns] @ x off a total: x float32 [B, N], total float32 [rows, N]."""
        if not len(total):
            return
        if self.halves is None:
            subtract_product(total, self.matrix[..., rows, columns], x)
            return
        high, low = (half[rows, columns] for half in self.halves)
        x_high, x_low = halves(x)
        left, right = torch.cat([high, high, low], 1), torch.cat([x_high, x_low, x_high])
        torch.addmm(total, left, right, torch.float32, alpha=-1, out=total)
