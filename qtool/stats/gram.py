"""The Gram matrix of an input, X^T X: GPTQ's Hessian up to a factor of 2 (https://arxiv.org/abs/2210.17323).

Where it is measured, the energies of channels are its diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.numerics.solving import gram
from qtool.numerics.threads.ranks import Ranks
from qtool.stats._base import Batch, InputStats, Statistic, expect


class Gram(Statistic):
    """X^T X over all tokens."""

    weighs = "instead"

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.sums: gram.GramSum | None = gram.GramSum(k, device)
        self._k = k
        self._matrix: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """X^T X so far, float32 [K, K]."""
        if self._matrix is None:
            assert self.sums is not None
            self._matrix = self.sums.total()
        return self._matrix

    @matrix.setter
    def matrix(self, matrix: Tensor) -> None:
        self._matrix, self.sums = matrix, None

    def add(self, batch: Batch) -> None:
        """See `Statistic.add`."""
        if self.sums is None:
            raise RuntimeError("a Gram matrix that was set or loaded takes no more tokens")
        self.sums.add(batch.weighted)
        self._matrix = None

    def merge(self, other: Gram) -> None:
        """See `Statistic.merge`."""
        self.matrix = self.matrix + other.matrix

    def combine(self, ranks: Ranks) -> None:
        """See `Statistic.combine`."""
        self.matrix = ranks.sum(self.matrix)

    def state(self) -> dict[str, Tensor]:
        """See `Statistic.state`."""
        return {"matrix": self.matrix}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Statistic.load`."""
        expect(state, {"matrix": (torch.float32, (self._k, self._k))})
        matrix = state["matrix"]
        if bool((matrix.diagonal() < 0).any()) or not torch.equal(matrix, matrix.T):
            raise ValueError("wanted a symmetric matrix without negative energies, found another")
        self.matrix = matrix


def gram_of(stats: InputStats | None) -> Tensor | None:
    """The Gram matrix of an input, float32 [K, K]; None where it was not measured."""
    found = stats.get(Gram) if stats else None
    return found.matrix if found else None
