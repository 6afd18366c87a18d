"""Puts channels into another order, and the weight's columns with them.

Source: the permutation of COMET, https://arxiv.org/abs/2410.12168
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.ops._base import InputOp, shortest_run, spread_places


@dataclass(frozen=True, eq=False)
class Permutation(InputOp):
    """Channel j is what was channel `order[j]`.

    Attributes:
        order: int64 [C].
    """

    order: Tensor

    orthogonal = True

    def __post_init__(self) -> None:
        if self.order.ndim != 1 or not torch.equal(self.order.sort().values, torch.arange(len(self.order))):
            raise ValueError("an order has each channel once")

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return len(self.order)

    @property
    def run(self) -> int:
        """See `InputOp.run`."""
        return shortest_run(self.order)

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        return x[..., self.order.to(x.device)]

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`."""
        return self.apply(w)

    def spread(self, repeat: int, dim: int) -> Permutation:
        """See `InputOp.spread`; channels stay in their run."""
        return Permutation(spread_places(self.order, repeat, dim))
