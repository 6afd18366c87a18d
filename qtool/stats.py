"""What calibration can measure about the input of a linear layer, and how measurements merge.

Layers that read the same input share one `InputStats`, so its Gram matrix is accumulated once and factorized once.

Shape letters: T tokens, K input features.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Stat(Enum):
    """What a method can ask for. Sums of squares, ranges and token counts are cheap and always kept."""

    GRAM = "gram"
    """X^T X, float32 [K, K]: GPTQ's Hessian up to a factor of 2."""
    CHANNELS = "channels"
    """Sum of squares, absolute maximum, minimum and maximum, float32 [K] each: the importance matrix of llama.cpp."""


class InputStats:
    """Statistics of one input, grown batch by batch.

    Attributes:
        tokens: T so far.
        gram: float32 [K, K], or None where no method asked for it.
        sum_squares, low, high: float32 [K].
        cache: what methods derived from the finished statistics, kept for the next layer that reads this input.
    """

    def __init__(self, k: int, needs: frozenset[Stat], device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.gram = torch.zeros(k, k, device=device) if Stat.GRAM in needs else None
        self.sum_squares = torch.zeros(k, device=device)
        self.low = torch.full((k,), torch.inf, device=device)
        self.high = torch.full((k,), -torch.inf, device=device)
        self.cache: dict[object, object] = {}

    def add(self, x: Tensor) -> None:
        """Counts a batch of inputs, [T, K] of any float type."""
        low, high = torch.aminmax(x, dim=0)
        self.low = torch.minimum(self.low, low.float())
        self.high = torch.maximum(self.high, high.float())
        x = x.float()
        self.tokens += x.shape[0]
        if self.gram is None:
            self.sum_squares += x.square().sum(0)
        else:
            self.gram.addmm_(x.T, x)
            self.sum_squares = self.gram.diagonal().clone()

    def merge(self, other: InputStats) -> None:
        """Adds what another part of the calibration tokens measured."""
        self.tokens += other.tokens
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram
        self.sum_squares += other.sum_squares
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    @property
    def absmax(self) -> Tensor:
        """float32 [K]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def importance(self) -> Tensor:
        """Mean square per channel, float32 [K]."""
        return self.sum_squares / max(self.tokens, 1)
