"""How all numbers of an input are distributed: what a scale is chosen by that holds for every token.

Counts in bins, from which ranges are found by several rules, as in https://arxiv.org/abs/2004.09602.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.numerics.histogram import Histogram
from qtool.stats._base import Batch, Statistic, expect


class Values(Statistic):
    """A histogram of all channels together.

    Attributes:
        histogram: of one row.
    """

    unrounded = True

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.histogram = Histogram()

    def add(self, batch: Batch) -> None:
        """See `Statistic.add`."""
        self.histogram.add(batch.x)

    def merge(self, other: Values) -> None:
        """See `Statistic.merge`."""
        self.histogram.merge(other.histogram)

    def state(self) -> dict[str, Tensor]:
        """See `Statistic.state`."""
        h = self.histogram
        return {"counts": h.counts, "reach": h.reach, "low": h.low, "high": h.high}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Statistic.load`."""
        found = Histogram()
        like = {name: (torch.float32, tuple(found.reach.shape)) for name in ("reach", "low", "high")}
        expect(state, like | {"counts": (found.counts.dtype, tuple(found.counts.shape))})
        counts, reach, low, high = (state[name] for name in ("counts", "reach", "low", "high"))
        if bool((counts < 0).any() or (reach < torch.maximum(-low, high)).any() or (low > high).any()):
            raise ValueError("wanted counts of numbers within their reach, found others")
        found.counts, found.reach, found.low, found.high = counts, reach, low, high
        self.histogram = found
