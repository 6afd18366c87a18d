"""Multiplies runs of channels with matrices that have inverses; each is the Kronecker product of two small ones.

The first factor belongs to a run, the second is that of all runs. One run is FlatQuant's matrix of a layer
(https://arxiv.org/abs/2410.09426), runs as long as the groups of a format are BATQuant's (private and shared factors),
and a second factor of order one leaves a matrix for each run, such as AffineQuant's for heads
(https://arxiv.org/abs/2403.12544).

Shape letters: C channels, M runs, A and B orders of the first and the second factor, C = M A B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.ops._base import InputOp

CONDITION = 1e5
"""How large numbers of a factor and of its inverse may be, multiplied."""


@dataclass(frozen=True, eq=False)
class Kronecker(InputOp):
    """x -> x (L_m (x) R), run by run; the weight's columns by the inverse of its transpose.

    Attributes:
        left: float [M, A, A].
        right: float [B, B].
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.ndim != 3 or right.ndim != 2 or left.shape[1] != left.shape[2] or right.shape[0] != right.shape[1]:
            raise ValueError("factors are square, the first one of each run and one for all of them")
        if not bool(left.isfinite().all() & right.isfinite().all()):
            raise ValueError("factors are finite numbers")

    @property
    def label(self) -> str:
        """See `InputOp.label`: "kronecker-8x4"."""
        return f"kronecker-{self.left.shape[1]}x{self.right.shape[0]}"

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return len(self.left) * self.run

    @property
    def run(self) -> int:
        """See `InputOp.run`."""
        return self.left.shape[1] * self.right.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        return product(x, self.left.to(x), self.right.to(x))

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`. Raises ValueError: a factor has no inverse."""
        return product(w, *(inverse_transposed(factor.double()).to(w) for factor in (self.left, self.right)))

    def spread(self, repeat: int, dim: int) -> Kronecker:
        """See `InputOp.spread`."""
        m, a, _ = self.left.shape
        runs = self.left.view(-1, 1, dim // self.run, a, a).expand(-1, repeat, -1, -1, -1)
        return Kronecker(runs.reshape(m * repeat, a, a), self.right)


def product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows times a block-diagonal matrix of Kronecker products, [..., C] -> same shape.

    Args:
        x: [..., C].
        left: [M, A, A].
        right: [B, B].
    """
    (m, a, _), b = left.shape, len(right)
    runs = x.reshape(-1, m, a, b) @ right
    turned = runs.permute(1, 0, 3, 2)
    mixed = torch.bmm(turned.reshape(m, -1, a), left).view(turned.shape)
    return mixed.permute(1, 0, 3, 2).reshape(x.shape)


def inverse_transposed(p: Tensor) -> Tensor:
    """Inverses of the transposes of matrices, float64 [..., A, A]. Raises ValueError: one has none, or nearly so."""
    squared = p.mT @ p
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(squared))
    except RuntimeError as error:
        raise ValueError("factors have no inverse") from error
    if not bool((inverse.abs().amax((-1, -2)) * squared.abs().amax((-1, -2)) < CONDITION**2).all()):
        raise ValueError("factors have no inverse that float32 could hold")
    return p @ inverse
