"""Multiplies runs of channels with orthogonal matrices; of the weight's columns alike.

Source: SpinQuant, https://arxiv.org/abs/2405.16406
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.ops._base import InputOp

TOLERANCE = 1e-4
"""How far the product of a matrix with its transpose may be from one: what float32 leaves of one of order 10,000."""


@dataclass(frozen=True, eq=False)
class Orthogonal(InputOp):
    """x -> x Q, run by run.

    Attributes:
        matrices: float [M, D, D], one for each run of D channels.
    """

    matrices: Tensor

    orthogonal = True

    def __post_init__(self) -> None:
        q = self.matrices
        if q.ndim != 3 or q.shape[1] != q.shape[2]:
            raise ValueError("matrices are square, one for each run of channels")
        apart = q.double() @ q.double().mT - torch.eye(q.shape[1], dtype=torch.float64)
        if not bool((apart.abs() < TOLERANCE).all()):
            raise ValueError("matrices are orthogonal")
        object.__setattr__(self, "matrices", q.contiguous())  # products depend on the order in memory, files have one

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return self.matrices.shape[0] * self.matrices.shape[1]

    @property
    def run(self) -> int:
        """See `InputOp.run`."""
        return self.matrices.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        count, dim, _ = self.matrices.shape
        runs = x.reshape(-1, count, dim).transpose(0, 1)
        return torch.bmm(runs, self.matrices.to(x)).transpose(0, 1).reshape(x.shape)

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`."""
        return self.apply(w)

    def spread(self, repeat: int, dim: int) -> Orthogonal:
        """See `InputOp.spread`; runs are those of the matrices."""
        return Orthogonal(self.matrices.repeat_interleave(repeat, 0))
