"""Measures the inputs of linear layers while batches run through a block in step.

Shape letters: T tokens, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from qtool.calibrate.steps import InStep
from qtool.stats import InputStats, Stat

EXPECTED: ContextVar[dict[str, Tensor]] = ContextVar("expected")
"""What the unquantized model reads in the batch that runs, by `Module.reads`, [T', K] for its first T' tokens."""


class Meter:
    """Statistics of some inputs, one batch after the other.

    Args:
        widths: K of each input, by `Module.reads`.
        needs: what to measure there.
        device: where.

    """

    def __init__(self, widths: Mapping[str, int], needs: Mapping[str, frozenset[Stat]], device: torch.device) -> None:
        self.widths, self.needs, self.device = widths, needs, device
        self.stats: dict[str, InputStats] = {}

    def hook(self, reads: str, flow: InStep) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook that hands over a layer's input, then waits until all batches have been measured."""

        def measure(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if reads not in flow.passed:
                flow.wait(reads, (inputs[0].flatten(0, -2), EXPECTED.get().pop(reads, None)))

        return measure

    def count(self, reads: str, inputs: tuple[Tensor, Tensor | None]) -> None:
        """Counts a batch, [T, K], and compares its first tokens with what they should be, [T', K]."""
        x, x_0 = inputs
        if reads not in self.stats:
            self.stats[reads] = InputStats(self.widths[reads], self.needs[reads], self.device)
        compared = 0 if x_0 is None else len(x_0)
        if x_0 is not None:
            self.stats[reads].compare(x[:compared], x_0)
        if compared < len(x):
            self.stats[reads].add(x[compared:])

    def take(self, reads: str) -> InputStats:
        """The statistics of an input; not kept here any longer."""
        return self.stats.pop(reads, None) or InputStats(self.widths[reads], self.needs[reads], self.device)
