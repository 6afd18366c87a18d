"""Measures the inputs of linear layers while batches run through a block in step.

Shape letters: S samples, T tokens of them, K input features, B groups of a module's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.numerics.threads.marks import marked
from qtool.stats._base import InputStats, Statistic


class Meter:
    """Statistics of some inputs, one batch after the other.

    Args:
        widths: K of each input, by `Module.reads`.
        needs: what to measure there.
        device: where.
        weights: how much each token counts for the modules that read an input, by its name and theirs: float32
            [S, T, B]; inputs that are not named weigh all alike.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        needs: Mapping[str, frozenset[type[Statistic]]],
        device: torch.device,
        weights: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.widths, self.needs, self.device, self.weights = widths, needs, device, weights or {}
        self.stats: dict[str, InputStats] = {}
        self.expected: dict[int, dict[str, Tensor]] = {}

    def expect(self, part: slice, inputs: dict[str, Tensor]) -> None:
        """Tells what is known of a batch before it runs.

        Args:
            part: its samples.
            inputs: what the unquantized model reads there, by `Module.reads`, [T', K] for its first T' tokens.
        """
        self.expected[part.start] = inputs

    def count(self, _: str, seen: Mapping[str, Tensor], part: slice) -> None:
        """Counts a batch at a place: inputs [T, K] by `Module.reads`."""
        with marked("statistics"):
            for reads, x in seen.items():
                self.count_input(reads, x, part)

    def count_input(self, reads: str, x: Tensor, part: slice) -> None:
        """Counts a batch, [T, K], and compares its first tokens with what they should be."""
        if reads not in self.stats:
            self.stats[reads] = self.fresh(reads)
        reference = self.expected[part.start].pop(reads, None)
        weights = {name: w[part].flatten(0, 1).to(x.device) for name, w in self.weights.get(reads, {}).items()}
        self.stats[reads].add(x, reference, weights)

    def take(self, reads: str) -> InputStats:
        """The statistics of an input; not kept here any longer."""
        return self.stats.pop(reads, None) or self.fresh(reads)

    def fresh(self, reads: str) -> InputStats:
        """Statistics of an input that count no token yet."""
        groups = {name: w.shape[-1] for name, w in self.weights.get(reads, {}).items()}
        return InputStats(self.widths[reads], self.needs[reads], self.device, groups)
