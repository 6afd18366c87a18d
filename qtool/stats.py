"""What calibration can measure about the input of a linear layer, and how measurements merge.

Layers that read the same input share one `InputStats`, so its Gram matrix is accumulated once and factorized once.

Shape letters: T tokens, K input features.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from qtool.numerics.histogram import Histogram
from qtool.numerics.solving.gram import Gram


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
        gram: float32 [K, K], or None where no method asked for it.
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
        self._growing = Gram(k, device) if Stat.GRAM in needs else None
        self._gram: Tensor | None = None
        self._drift: Tensor | None = None
        self._compared: Tensor | None = None
        self._squares: Tensor | None = None if Stat.GRAM in needs else torch.zeros(k, device=device)
        self.low = torch.full((k,), torch.inf, device=device)
        self.high = torch.full((k,), -torch.inf, device=device)
        self.values = Histogram() if Stat.VALUES in needs else None
        self.cache: dict[object, object] = {}

    @property
    def gram(self) -> Tensor | None:
        """X^T X so far, float32 [K, K]."""
        if self._gram is None and self._growing is not None:
            self._gram = self._growing.total()
        return self._gram

    @gram.setter
    def gram(self, gram: Tensor | None) -> None:
        self._gram, self._growing = gram, None

    @property
    def sum_squares(self) -> Tensor:
        """float32 [K]; the diagonal of the Gram matrix where there is one."""
        if self._squares is not None:
            return self._squares
        assert self.gram is not None
        return self.gram.diagonal()

    @sum_squares.setter
    def sum_squares(self, sums: Tensor) -> None:
        self._squares = sums

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
        self.tokens += x.shape[0]
        if self._growing is not None:
            self._growing.add(x)
            self._gram = None
        if self._squares is not None:
            self._squares += x.float().square().sum(0)

    def merge(self, other: InputStats) -> None:
        """Adds what another part of the calibration tokens measured."""
        self.tokens += other.tokens
        if self.drift is not None and other.drift is not None:
            (drift, gram), (more, more_gram) = self.drift, other.drift
            self._drift, self._compared = drift + more, gram + more_gram
        if self.gram is not None and other.gram is not None:
            self.gram = self.gram + other.gram
        if self._squares is not None:
            self._squares += other.sum_squares
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
