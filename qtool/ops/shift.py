"""Subtracts a number from each channel, and adds what the weight makes of it to the bias.

Source: Outlier Suppression+, https://arxiv.org/abs/2304.09145
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qtool.ops._base import InputOp, spread


@dataclass(frozen=True, eq=False)
class Shift(InputOp):
    """Number j is subtracted from channel j.

    Attributes:
        amounts: float [C].
    """

    amounts: Tensor

    adds = True

    def __post_init__(self) -> None:
        if self.amounts.ndim != 1 or not bool(self.amounts.isfinite().all()):
            raise ValueError("amounts are finite numbers, one for each channel")

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return len(self.amounts)

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        return x - self.amounts.to(x)

    def mix(self, x: Tensor) -> Tensor:
        """See `InputOp.mix`."""
        return x

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`."""
        return w

    def bias(self, w: Tensor) -> Tensor:
        """See `InputOp.bias`."""
        return w @ self.amounts.to(w)

    def spread(self, repeat: int, dim: int) -> Shift:
        """See `InputOp.spread`."""
        return Shift(spread(self.amounts, repeat, dim))
