"""What calibration can measure about the input of a linear layer, and how measurements merge.

Layers that read the same input share one `InputStats`, so its Gram matrix is accumulated once and factorized once.

Shape letters: T tokens, K input features.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from qtool.numerics.histogram import Histogram

PANEL = 192
"""Smallest width of the strips in which a Gram matrix is accumulated; only strips on and below the diagonal are."""


class Stat(Enum):
    """What a method can ask for. Sums of squares and token counts are always kept."""

    GRAM = "gram"
    """X^T X, float32 [K, K]: GPTQ's Hessian up to a factor of 2."""
    DRIFT = "drift"
    """How inputs drift behind quantized layers: (X_0 - X)^T X, float32 [K, K], X_0 those of the unquantized model."""
    CHANNELS = "channels"
    """Sums of squares and ranges, float32 [K] each: the importance matrix of llama.cpp, and activation scales."""
    VALUES = "values"
    """How all numbers of the input are distributed: what a scale is chosen by that holds for every token."""


class InputStats:
    """Statistics of one input, grown batch by batch.

    Attributes:
        tokens: T so far.
        gram: float32 [K, K], or None where no method asked for it. Its upper half is filled in when it is first read.
        sum_squares: float32 [K].
        low, high: float32 [K], infinite where nobody asked for them.
        values: of all channels together; None where nobody asked for it.
        drift: (X_0 - X)^T X and X^T X over the tokens that were compared with the unquantized model, float32 [K, K]
            each; None if none were.
        cache: what methods derived from the finished statistics, kept for the next layer that reads this input.
    """

    def __init__(self, k: int, needs: frozenset[Stat], device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.needs = needs
        self._lower = torch.zeros(k, k, device=device) if Stat.GRAM in needs else None
        self._whole = True
        self._drift: Tensor | None = None
        self._compared: Tensor | None = None
        self.sum_squares = torch.zeros(k, device=device)
        self.low = torch.full((k,), torch.inf, device=device)
        self.high = torch.full((k,), -torch.inf, device=device)
        self.values = Histogram() if Stat.VALUES in needs else None
        self.cache: dict[object, object] = {}

    @property
    def gram(self) -> Tensor | None:
        """X^T X so far, float32 [K, K]."""
        if self._lower is not None and not self._whole:
            self._lower = self._lower.tril() + self._lower.tril(-1).T
            self._whole = True
        return self._lower

    @gram.setter
    def gram(self, gram: Tensor | None) -> None:
        self._lower, self._whole = gram, True

    @property
    def drift(self) -> tuple[Tensor, Tensor] | None:
        """See the class."""
        gram = self.gram if self._compared is None else self._compared
        return None if self._drift is None or gram is None else (self._drift, gram)

    def compare(self, x: Tensor, reference: Tensor) -> None:
        """Counts a batch of inputs together with those of the unquantized model, [T, K] each; before all other batches.

        The differences are small, so their products may be rounded to the type of the inputs.
        """
        cross = ((reference - x).T @ x).float()
        self._drift = cross if self._drift is None else self._drift + cross
        self.add(x, compared=True)

    def add(self, x: Tensor, compared: bool = False) -> None:
        """Counts a batch of inputs, [T, K] of any float type."""
        if self._drift is not None and not compared and self._compared is None and self.gram is not None:
            self._compared = self.gram.clone()
        if Stat.CHANNELS in self.needs:
            low, high = torch.aminmax(x, dim=0)
            self.low = torch.minimum(self.low, low.float())
            self.high = torch.maximum(self.high, high.float())
        if self.values:
            self.values.add(x)
        x = x.float()
        self.tokens += x.shape[0]
        if self._lower is None:
            self.sum_squares += x.square().sum(0)
            return
        k = x.shape[1]
        width = max(PANEL, -(-k // 8))
        for start in range(0, k, width):
            strip = self._lower[start:, start : start + width]
            strip.addmm_(x[:, start:].T, x[:, start : start + width])
        self._whole = False
        self.sum_squares = self._lower.diagonal().clone()

    def merge(self, other: InputStats) -> None:
        """Adds what another part of the calibration tokens measured."""
        self.tokens += other.tokens
        if self.drift is not None and other.drift is not None:
            (drift, gram), (more, more_gram) = self.drift, other.drift
            self._drift, self._compared = drift + more, gram + more_gram
        if self.gram is not None and other.gram is not None:
            self.gram = self.gram + other.gram
        self.sum_squares += other.sum_squares
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        if self.values and other.values:
            self.values.merge(other.values)

    @property
    def absmax(self) -> Tensor:
        """float32 [K]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def importance(self) -> Tensor:
        """Mean square per channel, float32 [K]."""
        return self.sum_squares / max(self.tokens, 1)
