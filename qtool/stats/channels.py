"""Sums of squares and ranges of every channel: scales of inputs, and the importance matrix of llama.cpp.

See https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix for the latter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.stats._base import Batch, Statistic, expect
from qtool.stats.gram import Gram


class Channels(Statistic):
    """Sums of squares, smallest and largest numbers.

    Attributes:
        sums: of squares, float32 [K]; not counted where the Gram matrix is measured too.
        low, high: float32 [K]; infinite where they are not known.
    """

    sequential = False
    weighs = "also"

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(k, device=device)
        self.low = torch.full((k,), torch.inf, device=device)
        self.high = torch.full((k,), -torch.inf, device=device)

    @property
    def sum_squares(self) -> Tensor:
        """float32 [K]; the diagonal of the Gram matrix where that is measured too."""
        gram = self.others.get(Gram)
        return self.sums if gram is None else gram.matrix.diagonal()

    @property
    def importance(self) -> Tensor:
        """Mean square per channel, float32 [K]."""
        return self.sum_squares / max(self.others.tokens, 1)

    @property
    def absmax(self) -> Tensor:
        """float32 [K]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def add(self, batch: Batch) -> None:
        """See `Statistic.add`."""
        low, high = torch.aminmax(batch.x, dim=0)
        self.low = torch.minimum(self.low, low.float())
        self.high = torch.maximum(self.high, high.float())
        if Gram not in self.others:
            squares = batch.x.float().square()
            if batch.weights is not None:
                squares *= batch.weights.to(squares.device)[:, None]
            self.sums += squares.sum(0)

    def merge(self, other: Channels) -> None:
        """See `Statistic.merge`."""
        self.sums = self.sums + other.sums
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    def state(self) -> dict[str, Tensor]:
        """See `Statistic.state`."""
        return {"sum_squares": self.sum_squares.clone(), "low": self.low, "high": self.high}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Statistic.load`."""
        expect(state, dict.fromkeys(("sum_squares", "low", "high"), (torch.float32, tuple(self.low.shape))))
        sums, low, high = (state[name] for name in ("sum_squares", "low", "high"))
        if not bool(((sums >= 0) & (low <= high)).all()):
            raise ValueError("wanted squares that are not negative and low <= high, found others")
        self.sums, self.low, self.high = sums, low, high
