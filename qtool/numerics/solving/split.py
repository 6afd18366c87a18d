"""Products of float32 matrices on the units of a CUDA device that multiply bfloat16 numbers.

Each factor is the sum of two bfloat16 matrices, which keep 16 bits of it; of the four products the smallest is left
out. That is several times as fast as float32, and an error of about 2^-16 of the factors.

Shape letters: K columns, N rows, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.solving.gram import FUSED


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is nearly x, the larger first."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


SMALL = 2048
"""Columns up to which products take no longer in float32 than their factors to be split."""


class Split:
    """A matrix [K, K] that many others are multiplied with.

    Args:
        matrix: float32.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.halves = halves(matrix) if matrix.is_cuda and FUSED and len(matrix) > SMALL else None

    def subtract(self, total: Tensor, rows: slice, columns: slice, x: Tensor) -> None:
        """Takes matrix[rows, columns] @ x off a total: x float32 [B, N], total float32 [rows, N]."""
        if not len(total):
            return
        if self.halves is None:
            total.addmm_(self.matrix[rows, columns], x, alpha=-1)
            return
        high, low = (half[rows, columns] for half in self.halves)
        x_high, x_low = halves(x)
        left, right = torch.cat([high, high, low], 1), torch.cat([x_high, x_low, x_high])
        torch.addmm(total, left, right, torch.float32, alpha=-1, out=total)
