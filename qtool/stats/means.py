"""Sums of every channel: means of what layers read, and so of what they write.

With them biases are corrected: https://arxiv.org/abs/1906.04721
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.stats._base import Batch, Statistic, expect


class Means(Statistic):
    """Sums over tokens.

    Attributes:
        sums: float64 [K].
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(k, dtype=torch.float64, device=device)

    @property
    def mean(self) -> Tensor:
        """float64 [K]."""
        return self.sums / max(self.others.tokens, 1)

    def add(self, batch: Batch) -> None:
        """See `Statistic.add`."""
        self.sums += batch.x.sum(0, dtype=torch.float64)

    def merge(self, other: Means) -> None:
        """See `Statistic.merge`."""
        self.sums += other.sums

    def state(self) -> dict[str, Tensor]:
        """See `Statistic.state`."""
        return {"sums": self.sums}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Statistic.load`."""
        expect(state, {"sums": (torch.float64, tuple(self.sums.shape))})
        self.sums = state["sums"]
