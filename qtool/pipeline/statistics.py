"""Where a layer's statistics come from: nowhere, a file, or the calibration tokens walked through the model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qtool.calibrate.walker import Walker
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.solve import Unit
from qtool.plan import Plan
from qtool.stats import InputStats, Stat

Weight = Callable[[str], Tensor]
"""Module name -> [N, K], the weight that a runtime will multiply with."""


class Statistics(ABC):
    """What the loop over units asks: `measure` for each unit that is not finished yet, then `finish` for every unit.

    Attributes:
        digest: changes when the statistics would; None without data.
        about: what the report says about them.
    """

    digest: str | None = None
    about: dict[str, object] = {}

    @abstractmethod
    def measure(self, unit: Unit) -> dict[str, InputStats]:
        """Statistics of the inputs that the unit's modules read, by `Module.reads`."""

    @abstractmethod
    def finish(self, unit: Unit, weight: Weight) -> None:
        """Goes on to the next unit; `weight` gives the decoded weights of this one."""


class Stored(Statistics):
    """Statistics from an earlier run of `calibrate`, or none at all."""

    def __init__(self, stats: Mapping[str, InputStats]) -> None:
        self.stats = stats

    def measure(self, unit: Unit) -> dict[str, InputStats]:
        """See `Statistics.measure`."""
        return dict(self.stats)

    def finish(self, unit: Unit, weight: Weight) -> None:
        """Nothing is carried along."""


class Walked(Statistics):
    """Runs the calibration tokens through one block after the other.

    Args:
        walker: over the unquantized model.
        tokens: int64 [S, T].
        plan: says what to measure, and how far to walk.
    """

    def __init__(self, walker: Walker, tokens: Tensor, plan: Plan) -> None:
        self.walker, self.hidden = walker, walker.embed(tokens)
        self.quantized = plan.recipe.calibration.propagate == "quantized"
        measured = [p.module.block for p in plan.layers if p.method and p.method.needs]
        head = None in measured
        self.last = len(walker.blocks) if head else max(b for b in measured if b is not None)
        self.block: nn.Module | None = None
        self.advanced = False

    def measure(self, unit: Unit) -> dict[str, InputStats]:
        """See `Statistics.measure`."""
        needs = wanted(unit)
        if not needs:
            return {}
        if unit.block is None:
            return {unit.layers[0].module.reads: self.walker.collect_head(self.hidden, needs)}
        self.block = self.walker.load_block(unit.block)
        self.advanced = not self.quantized and unit.block < self.last
        return self.walker.collect(self.block, unit.block, self.hidden, needs, advance=self.advanced)

    def finish(self, unit: Unit, weight: Weight) -> None:
        """Replaces the hidden states by the unit's outputs, unless nobody behind it wants them."""
        if unit.block is not None and unit.block < self.last and not self.advanced:
            block = self.block or self.walker.load_block(unit.block)
            layers = unit.quantized if self.quantized else ()
            for p in layers:
                self.walker.set_weight(block, p.module, weight(p.module.name))
            inputs = {p.module.name: p.activations for p in layers if p.activations}
            with self.walker.quantized_inputs(block, unit.block, inputs):
                self.walker.advance(block, unit.block, self.hidden)
        self.block, self.advanced = None, False


def wanted(unit: Unit) -> frozenset[Stat]:
    """Everything that the unit's methods need."""
    return frozenset[Stat]().union(*(p.method.needs for p in unit.quantized if p.method))


def statistics_for(
    job: Job, stored: Path | None, device: torch.device, dtype: torch.dtype, listener: Listener
) -> Statistics:
    """Chooses where a run's statistics come from.

    Args:
        job: says whether any method needs some.
        stored: statistics of an earlier `calibrate`; None: run the calibration tokens.
        device, dtype: where and in which type blocks are run.
        listener: told about progress.

    Raises:
        CheckpointError, UsageError, MissingExtra, HubError: see `load_tokens`.
    """
    if not any(p.method and p.method.needs for p in job.plan.layers):
        return Stored({})
    calibration = job.plan.recipe.calibration
    listener(Event("calibrate", 0, 1, str(calibration.data)))
    from qtool.calibrate.tokens import load_tokens  # TODO top

    tokens = load_tokens(calibration, job.checkpoint)
    source = Walked(Walker(job.checkpoint, device, dtype), tokens, job.plan)
    source.digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    source.about = {**calibration.model_dump(mode="json"), "tokens": tokens.numel()}
    listener(Event("calibrate", 1, 1, f"{tokens.numel()} tokens"))
    return source
