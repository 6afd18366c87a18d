"""How numbers are distributed, counted batch by batch in memory that does not grow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 8192
"""Even. Where 8-bit codes cover all of the range, 32 bins share a code; clipped to a thirtieth of it, one."""


class Histogram:
    """Counts in BINS bins of one width between -reach and reach, a power of two that doubles when numbers demand it.

    Attributes:
        counts: float64 [BINS].
        reach: largest magnitude that is in a bin; 0 before the first number.
        low, high: the smallest and the largest number.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.reach, self.low, self.high = 0.0, math.inf, -math.inf

    def add(self, x: Tensor) -> None:
        """Counts a batch of finite numbers, of any shape and float type."""
        if x.numel() == 0:
            return
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover(max(-low, high))
        self.counts += torch.histc(x.float(), BINS, -self.reach, self.reach).double().cpu()

    def merge(self, other: Histogram) -> None:
        """Adds what another one counted."""
        if other.reach == 0:
            return
        self._cover(other.reach)
        other._cover(self.reach)
        self.counts += other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def centers(self) -> Tensor:
        """float32 [BINS], what the numbers of a bin are taken for."""
        return (torch.arange(BINS) + 0.5) * (2 * self.reach / BINS) - self.reach

    def _cover(self, largest: float) -> None:
        """Doubles the reach until it covers a magnitude; two neighbours become one bin each time."""
        if self.reach == 0:
            self.reach = 2.0 ** math.frexp(max(largest, 1e-30))[1]
        while self.reach < largest:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(pairs, (BINS // 4, BINS // 4))
            self.reach *= 2
