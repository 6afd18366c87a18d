"""Divides each channel by a factor, and multiplies the weight's column with it.

Source: SmoothQuant, https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.ops._base import InputOp, spread


@dataclass(frozen=True, eq=False)
class Scale(InputOp):
    """Channel j is divided by factor j.

    Attributes:
        factors: float [C], finite and not zero.
    """

    factors: Tensor

    def __post_init__(self) -> None:
        if self.factors.ndim != 1 or not bool((torch.isfinite(self.factors) & (self.factors != 0)).all()):
            raise ValueError("factors are finite numbers other than zero, one for each channel")

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return len(self.factors)

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        return x / self.factors.to(x)

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`."""
        return w * self.factors.to(w)

    def spread(self, repeat: int, dim: int) -> Scale:
        """See `InputOp.spread`."""
        return Scale(spread(self.factors, repeat, dim))
