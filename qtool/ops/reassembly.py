"""Splits some channels into parts, and makes room for these by merging pairs of others.

    x'_j = share_j (x_first(j) + x_second(j)),  w'_j = w_first(j), plus w_second(j) where that is another one

A channel alone has itself as second and a share of one half; of a channel in T parts each has a share of 1 / 2T, so
that T columns alike add up to it. Of a merged pair the weight reads the mean: exact only as far as both are alike.
Channel disassembly and assembly of QLLM, https://arxiv.org/abs/2310.08041

Shape letters: C channels, N rows of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.ops._base import InputOp, shortest_run, spread, spread_places


@dataclass(frozen=True, eq=False)
class Reassembly(InputOp):
    """Channel j is a share of the sum of two.

    Attributes:
        first: int64 [C].
        second: int64 [C].
        shares: float [C].
    """

    first: Tensor
    second: Tensor
    shares: Tensor

    def __post_init__(self) -> None:
        c = len(self.first)
        for at in (self.first, self.second):
            if at.dtype != torch.int64 or at.shape != (c,) or not bool(((at >= 0) & (at < c)).all()):
                raise ValueError(f"first and second are channels below {c}, one for each")
        if self.shares.shape != (c,) or not bool((self.shares.isfinite() & (self.shares > 0)).all()):
            raise ValueError("shares are positive numbers, one for each channel")

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return len(self.first)

    @property
    def run(self) -> int:
        """See `InputOp.run`."""
        return shortest_run(self.first, self.second)

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        first, second = self.first.to(x.device), self.second.to(x.device)
        return (x[..., first] + x[..., second]) * self.shares.to(x)

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`."""
        first, second = self.first.to(w.device), self.second.to(w.device)
        return w[..., first] + torch.where(first == second, 0.0, w[..., second])

    def spread(self, repeat: int, dim: int) -> Reassembly:
        """See `InputOp.spread`; channels stay in their run."""
        first, second = (spread_places(at, repeat, dim) for at in (self.first, self.second))
        return Reassembly(first, second, spread(self.shares, repeat, dim))
