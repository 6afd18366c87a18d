"""Measures the inputs of linear layers while batches run through a block in step.

Shape letters: T tokens, K input features, B groups of a module's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qtool.calibrate.steps import InStep
from qtool.stats._base import InputStats, Statistic


class Meter:
    """Statistics of some inputs, one batch after the other.

    Args:
        widths: K of each input, by `Module.reads`.
        needs: what to measure there.
        device: where.
    """

    def __init__(
        self, widths: Mapping[str, int], needs: Mapping[str, frozenset[type[Statistic]]], device: torch.device
    ) -> None:
        self.widths, self.needs, self.device = widths, needs, device
        self.stats: dict[str, InputStats] = {}
        self.expected: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, Mapping[str, Tensor]] = {}

    def expect(self, part: slice, inputs: dict[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Tells what is known of a batch before it runs.

        Args:
            part: its samples.
            inputs: what the unquantized model reads there, by `Module.reads`, [T', K] for its first T' tokens.
            weights: of its tokens, by name of the module, float32 [T, B].
        """
        self.expected[part.start], self.weights[part.start] = inputs, weights

    def hook(self, reads: str, flow: InStep) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook that hands over a layer's input, then waits until all batches have been measured."""

        def measure(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if reads not in flow.passed:
                flow.wait(reads, inputs[0].flatten(0, -2))

        return measure

    def count(self, reads: str, x: Tensor, part: slice) -> None:
        """Counts a batch, [T, K], and compares its first tokens with what they should be."""
        if reads not in self.stats:
            self.stats[reads] = InputStats(self.widths[reads], self.needs[reads], self.device)
        reference = self.expected[part.start].pop(reads, None)
        self.stats[reads].add(x, reference, self.weights[part.start] or None)

    def take(self, reads: str) -> InputStats:
        """The statistics of an input; not kept here any longer."""
        return self.stats.pop(reads, None) or InputStats(self.widths[reads], self.needs[reads], self.device)
