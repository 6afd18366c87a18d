"""How far a plan would take a model from the original: its divergence on samples that nothing else was learned from.

Shape letters: S samples, T tokens of one, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.evaluate.divergence import score
from qtool.numerics.checks import finite

NORMAL = 1.96
"""Standard errors on each side of a mean that 95 % of a normal distribution lie within."""
POSITIONS = 64
"""Whose logits are compared at a time."""


class Divergence(NamedTuple):
    """KL divergence per held-out sample, nats per token."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over samples, which are equally long."""
        return statistics.fmean(self.samples)

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for a single sample."""
        return error_of(self.samples)

    @property
    def upper(self) -> float:
        """Above which the mean is not, with 95 % confidence."""
        return self.mean + NORMAL * self.error

    def less(self, other: Divergence) -> float:
        """Standard error of the difference to another plan's, sample by sample."""
        return error_of([a - b for a, b in zip(self.samples, other.samples, strict=True)])


def error_of(samples: Sequence[float]) -> float:
    """Standard error of a mean."""
    return statistics.stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf


class Trials:
    """Compares models with one on held-out samples.

    Args:
        original: what they are compared with.
        tokens: int64 [S, T].
        device: where to compute.
    """

    def __init__(self, original: Checkpoint, tokens: Tensor, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.original, self.expected = self.walked(original)

    def walked(self, model: Checkpoint) -> tuple[Walker, Hidden]:
        """A model with its hidden states behind the last block, in float32: bfloat16 alone costs 0.001 nats."""
        walker = Walker(model, self.device, torch.float32)
        hidden = walker.embed(self.tokens)
        for i in range(len(walker.blocks)):
            walker.advance(walker.load_block(i), i, hidden)
        return walker, hidden

    def of(self, model: Checkpoint) -> Divergence:
        """A model's divergence from the original. Raises NumericsError: its logits are not finite."""
        walker, hidden = self.walked(model)
        found = []
        for s, row in enumerate(self.tokens):
            logits = finite(walker.logits(hidden, s), f"logits of {model.source}")
            base, sums = self.original.logits(self.expected, s), []
            for start in range(0, len(row), POSITIONS):
                part = slice(start, start + POSITIONS)
                sums.append(float(score(logits[part], row[part], base[part])["kld"].sum()))
            found.append(math.fsum(sums) / len(row))
        return Divergence(tuple(found))
