"""Where a layer's statistics come from: nowhere, a file, or the calibration tokens walked through the model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from qtool.artifact._files import sha256
from qtool.calibrate.store import read_stats
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.errors import CheckpointError, PlanError
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.solve import Unit, units
from qtool.recipe.schema import Calibration
from qtool.stats import InputStats, Stat

Weight = Callable[[str], Tensor]
"""Module name -> [N, K], the weight that a runtime will multiply with."""


class Statistics(ABC):
    """What the loop over units asks: `measure` for a unit that is not solved yet, then `advance` to the next one.

    Args:
        digest: changes when the statistics would; None without data.
        about: what the report says about them.
    """

    def __init__(self, digest: str | None, about: dict[str, object]) -> None:
        self.digest, self.about = digest, about

    @abstractmethod
    def measure(self, unit: Unit) -> dict[str, InputStats]:
        """Statistics of the inputs that the unit's modules read, by `Module.reads`."""

    @abstractmethod
    def advance(self, unit: Unit, weight: Weight) -> None:
        """Goes on to the next unit; `weight` gives the decoded weights of this one."""


class Stored(Statistics):
    """Statistics from an earlier run of `calibrate`, or none at all."""

    def __init__(
        self, stats: Mapping[str, InputStats], digest: str | None = None, about: dict[str, object] | None = None
    ) -> None:
        super().__init__(digest, about or {})
        self.stats = stats

    def measure(self, unit: Unit) -> dict[str, InputStats]:
        """See `Statistics.measure`."""
        return dict(self.stats)

    def advance(self, unit: Unit, weight: Weight) -> None:
        """Nothing is carried along."""


class Walked(Statistics):
    """Runs the calibration tokens through one block after the other.

    Args:
        walker: over the unquantized model.
        tokens: int64 [S, T].
        calibration: whether a block's successor sees its quantized outputs; for the rest, see the report.
    """

    def __init__(self, walker: Walker, tokens: Tensor, calibration: Calibration) -> None:
        about = {**calibration.model_dump(mode="json"), "tokens": tokens.numel()}
        super().__init__(hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), about)
        self.walker, self.hidden = walker, walker.embed(tokens)
        self.quantized = calibration.propagate == "quantized"
        self.block: nn.Module | None = None
        self.ahead = False

    def measure(self, unit: Unit) -> dict[str, InputStats]:
        """See `Statistics.measure`."""
        if not unit.needs:
            return {}
        if unit.block is None:
            return {unit.layers[0].module.reads: self.walker.collect_head(self.hidden, unit.needs)}
        self.block = self.walker.load_block(unit.block)
        self.ahead = not self.quantized  # unquantized outputs are those of the pass that measures
        return self.walker.collect(self.block, unit.block, self.hidden, unit.needs, advance=self.ahead)

    def advance(self, unit: Unit, weight: Weight) -> None:
        """Replaces the hidden states by the unit's outputs."""
        if unit.block is not None and not self.ahead:
            block = self.block or self.walker.load_block(unit.block)
            layers = unit.quantized if self.quantized else ()
            for p in layers:
                self.walker.set_weight(block, p.module, weight(p.module.name))
            inputs = {p.module.name: p.activations for p in layers if p.activations}
            with self.walker.quantized_inputs(block, unit.block, inputs):
                self.walker.advance(block, unit.block, self.hidden)
        self.block, self.ahead = None, False


def statistics_for(job: Job, stored: Path | None, listener: Listener) -> Statistics:
    """Chooses where a run's statistics come from.

    Args:
        job: says whether any method needs some.
        stored: statistics of an earlier `calibrate`; None: run the calibration tokens.
        listener: told about progress.

    Raises:
        CheckpointError, MissingExtra, HubError: see `load_tokens` and `read`.
    """
    if not any(unit.needs for unit in units(job.plan)):
        return Stored({})
    if stored:
        return read(stored, job)
    calibration = job.plan.recipe.calibration
    listener(Event("calibrate", 0, 1, str(calibration.data)))
    tokens = load_tokens(calibration, job.checkpoint)
    source = Walked(Walker(job.checkpoint, job.device, job.dtype), tokens, calibration)
    listener(Event("calibrate", 1, 1, f"{tokens.numel()} tokens"))
    return source


def read(path: Path, job: Job) -> Stored:
    """Statistics that an earlier `calibrate` wrote.

    Raises:
        CheckpointError: damaged, or measured on another model.
        PlanError: a method needs more than they hold.
    """
    greedy = {p.method.name() for p in job.plan.layers if p.method and Stat.GRAM in p.method.needs}
    if greedy:
        line = f"{', '.join(sorted(greedy))} needs Gram matrices, which such a file does not hold; run without --stats"
        raise PlanError([line], f"statistics in {path}")
    stats, about = read_stats(path)
    if about.get("fingerprint") != job.plan.source_fingerprint:
        raise CheckpointError(
            f"the statistics in {path} were measured on another model",
            wanted=job.checkpoint.source,
            found=about.get("model"),
        )
    for p in job.plan.layers:
        if p.method and p.method.needs:
            found = len(stats[p.module.reads].sum_squares) if p.module.reads in stats else 0
            if found != p.module.shape[1]:
                what = f"the statistics in {path} do not fit {p.module.name}"
                raise CheckpointError(what, wanted=f"{p.module.shape[1]} inputs", found=found)
    return Stored(stats, sha256(path), about["calibration"])
