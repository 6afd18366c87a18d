"""How numbers are distributed, counted batch by batch in memory that does not grow.

Shape letters: R rows, each with a distribution of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtool.errors import NumericsError

LARGEST = 2.0**126
"""What numbers have to be smaller than: their reach is a power of two, and twice that is still a number."""

BINS = 8192
"""Even. Where 8-bit codes cover all of the range, 32 bins share a code; clipped to a thirtieth of it, one."""


class Histogram:
    """Counts in bins of one width between -reach and reach, a power of two that doubles when numbers demand it.

    Args:
        rows: R.
        bins: even.

    Attributes:
        counts: float64 [R, bins].
        reach: largest magnitude that is in a bin, float32 [R]; 0 before the first number.
        low, high: the smallest and the largest number, float32 [R].
    """

    def __init__(self, rows: int = 1, bins: int = BINS) -> None:
        self.counts = torch.zeros(rows, bins, dtype=torch.float64)
        self.reach = torch.zeros(rows)
        self.low, self.high = torch.full((rows,), math.inf), torch.full((rows,), -math.inf)

    def add(self, x: Tensor) -> None:
        """Counts a batch of numbers, [R, any number] or, with one row, of any shape; of any float type.

        Raises:
            NumericsError: one is NaN, or has no power of two above it in float32.
        """
        if x.numel() == 0:
            return
        rows, bins = self.counts.shape
        x = x.reshape(rows, -1).float()
        low, high = (end.cpu() for end in torch.aminmax(x, dim=1))
        largest = float(torch.maximum(-low, high).max())
        if not largest < LARGEST:
            raise NumericsError(
                "numbers are too large to be counted", wanted=f"below {LARGEST:g}", found=f"{largest:g}"
            )
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._cover(torch.maximum(-low, high))
        per_unit = (bins / 2 / self.reach).to(x.device)
        at = (x * per_unit[:, None]).floor_().add_(bins // 2).clamp_(0, bins - 1).int()
        at += torch.arange(rows, dtype=torch.int32, device=x.device)[:, None] * bins
        self.counts += torch.bincount(at.flatten(), minlength=rows * bins).view(rows, bins).cpu()

    def merge(self, other: Histogram) -> None:
        """Adds what another one counted, with as many rows and bins."""
        if not other.counts.any():
            return
        for mine, theirs in ((self, other), (other, self)):  # a row without numbers takes the other's bins as they are
            mine.reach = torch.where(mine.reach == 0, theirs.reach, mine.reach)
            mine._cover(theirs.reach)
        self.counts += other.counts
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def centers(self) -> Tensor:
        """float32 [R, bins], what the numbers of a bin are taken for."""
        bins = self.counts.shape[1]
        return (torch.arange(bins) + 0.5) * (2 * self.reach[:, None] / bins) - self.reach[:, None]

    def inner(self, share: float) -> tuple[Tensor, Tensor]:
        """Where a share in (0, 1) of each row's numbers lies, with as many below as above: (low, high), float32 [R]."""
        low = torch.maximum(self._quantile((1 - share) / 2), self.low)
        return low, torch.minimum(self._quantile((1 + share) / 2), self.high)

    def _quantile(self, share: float) -> Tensor:
        """What a share of each row's numbers lies below, float32 [R]; those of a bin are spread evenly over it."""
        sums = self.counts.cumsum(1)
        wanted = share * sums[:, -1:]
        at = (sums < wanted).sum(1, keepdim=True)
        before = sums.gather(1, at) - self.counts.gather(1, at)
        position = at + (wanted - before) / self.counts.gather(1, at)
        return (position.squeeze(1) * (2 / self.counts.shape[1]) - 1).float() * self.reach

    def _cover(self, largest: Tensor) -> None:
        """Doubles each row's reach until it covers a magnitude, [R]; two neighbours become one bin each time."""
        covered = largest.clamp_min(1e-30)
        power = covered / torch.frexp(covered).mantissa
        self.reach = torch.where(self.reach == 0, power, self.reach)
        while (short := self.reach < largest).any():
            bins = self.counts.shape[1]
            pairs = self.counts[short].view(-1, bins // 2, 2).sum(2)
            self.counts[short] = torch.nn.functional.pad(pairs, (bins // 4, bins // 4))
            self.reach[short] *= 2
