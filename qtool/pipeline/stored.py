"""Statistics of an earlier `calibrate`, or an importance matrix of llama.cpp, held against what a run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qtool.calibrate.shards import StatsFolder, is_stats_folder
from qtool.calibrate.store import read_stats
from qtool.checkpoint._base import Module
from qtool.errors import CheckpointError, PlanError
from qtool.pipeline.importance import read_importance
from qtool.pipeline.prepare import Job
from qtool.pipeline.units import needs_of, units
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats, Statistic
from qtool.stats.channels import Channels
from qtool.stats.values import Values
from qtool.store.files import sha256
from qtool.store.imatrix import is_imatrix

ORIGINAL = "--set calibration.propagate=float"
"""Has every block read the original model's hidden states, so that statistics serve whatever is done before."""
ROUND = "round with importances: --set 'method={rtn: {importance: true}}'"


class Files(Protocol):
    """Statistics by `Module.reads`."""

    digest: str
    """Changes when they do."""
    partial: bool
    """Whether it is no mistake if some inputs are missing."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What the report says about them."""

    def holds(self, reads: str) -> tuple[int, frozenset[str]] | None:
        """K and the names of the statistics of an input; None if nothing was measured there."""

    def read(self, reads: str, needs: frozenset[type[Statistic]]) -> InputStats | None:
        """Some statistics of an input; None if nothing was measured there."""


class Compact:
    """Those of channels, in memory.

    Args:
        stats: by `Module.reads`.
        digest, about: see `Files`.
        partial: whether inputs may be missing.
    """

    def __init__(
        self, stats: Mapping[str, InputStats], digest: str, about: Mapping[str, Any], partial: bool = False
    ) -> None:
        self.stats, self.digest, self.about, self.partial = stats, digest, about, partial

    def holds(self, reads: str) -> tuple[int, frozenset[str]] | None:
        """See `Files.holds`."""
        return (self.stats[reads].k, frozenset({Channels.name()})) if reads in self.stats else None

    def read(self, reads: str, needs: frozenset[type[Statistic]]) -> InputStats | None:
        """See `Files.read`."""
        return self.stats.get(reads)


class Sharded:
    """Those of a folder, read when they are asked for."""

    partial = False

    def __init__(self, folder: StatsFolder) -> None:
        self.folder, self.digest, self.about = folder, folder.digest, folder.about["calibration"]

    def holds(self, reads: str) -> tuple[int, frozenset[str]] | None:
        """See `Files.holds`."""
        counted = self.folder.index.inputs.get(reads)
        return (counted.channels, frozenset(counted.kinds)) if counted else None

    def read(self, reads: str, needs: frozenset[type[Statistic]]) -> InputStats | None:
        """See `Files.read`."""
        return self.folder.read(reads, needs) if reads in self.folder.index.inputs else None


def of_original(needs: frozenset[type[Statistic]]) -> frozenset[type[Statistic]]:
    """What can be measured on the original model: from that, nothing drifts."""
    return frozenset({kind for kind in needs if not kind.compares})


def readers(job: Job) -> list[Module]:
    """The modules whose input has to be measured."""
    return [p.module for p in job.plan.layers if p.needs]


def stored_for(job: Job, path: Path, warn: Callable[[str], None]) -> Files:
    """Opens statistics for a run.

    Args:
        job: the run.
        path: what `calibrate` or llama-imatrix wrote.
        warn: takes warnings.

    Raises:
        CheckpointError: damaged, or measured on another model.
        PlanError: the recipe needs more than they hold, or could hold.
    """
    files = opened(path, job)
    if lines := [*beyond(job), *lacking(job, files)]:
        raise PlanError(lines, f"statistics in {path}")
    missing = []
    for module in readers(job):
        k = counted[0] if (counted := files.holds(module.reads)) else 0
        if not k and (files.partial or module.expert is not None):
            missing.append(module)
        elif k != module.shape[1]:
            what = f"the statistics in {path} do not fit {module.name}"
            raise CheckpointError(what, wanted=f"{module.shape[1]} inputs", found=k)
    if missing:
        warn(f"{path} says nothing about the inputs of {and_more(missing)}: their codes are chosen without data")
    if zero := [m for m in readers(job) if m not in missing and all_zero(files, m)]:
        warn(f"{path} says that every input of {and_more(zero)} is zero")
    return files


def and_more(modules: Sequence[Module]) -> str:
    """The first one, and how many others."""
    return modules[0].name + f" and {len(modules) - 1} more" * (len(modules) > 1)


def all_zero(files: Files, module: Module) -> bool:
    """True if no channel of a module's input was ever other than 0."""
    stats = files.read(module.reads, frozenset({Channels}))
    return stats is not None and not bool(stats[Channels].sum_squares.any())


def beyond(job: Job) -> list[str]:
    """What a run needs that no statistics can stand for."""
    lines = []
    if block := [p for unit in units(job.plan) for p in unit.blockwise]:
        names = ", ".join(sorted({p.method.name() for p in block if p.method}))
        lines.append(f"{names} runs the model's blocks, for which statistics cannot stand in; run without --stats")
    if job.plan.recipe.transforms:
        lines.append("transforms change what layers read, these are the original model's inputs; run without --stats")
    if any(unit.cache and unit.cache.static for unit in units(job.plan)):
        lines.append("static scales of the KV cache are found while tokens run; run without --stats")
    return lines


def lacking(job: Job, files: Files) -> list[str]:
    """What a run needs and these statistics do not say; a line for each of them."""
    found = [holding[1] for m in readers(job) if (holding := files.holds(m.reads))]
    counted = frozenset.intersection(*found) if found else frozenset[str]()
    wanted = job.plan.recipe.calibration.model_dump(mode="json")["token_weights"]
    if not files.partial and wanted != (there := files.about.get("token_weights")):
        return [f"calibration.token_weights is {wanted or 'left out'}, it was measured with {there or 'none'}"]
    behind = job.plan.recipe.calibration.propagate == "quantized"
    lines = []
    for kind in sorted(of_original(needs_of(job.plan.layers)), key=lambda kind: kind.name()):
        users = ", ".join(dict.fromkeys(user for p in job.plan.layers for user in users_of(p, kind)))
        if kind.name() not in counted:
            measure = f"measure it: qtool calibrate MODEL --recipe RECIPE {ORIGINAL} -o STATS, or {ROUND}"
            lines.append(f"{users} needs {kind.name()}, which it does not hold; {measure}")
        elif kind.sequential and behind:
            why = "wants it measured behind quantized layers, this is of the original model"
            lines.append(f"{users} needs {kind.name()} and {why}; add {ORIGINAL}, or run without --stats, or {ROUND}")
    return lines


def users_of(plan: LayerPlan, kind: type[Statistic]) -> Iterator[str]:
    """What asks for a statistic, in a word each."""
    if plan.method and kind in plan.method.needs:
        yield plan.method.name()
    yield from (residual.name() for residual in plan.residuals if kind in residual.needs)
    if plan.activations and plan.activations.static and kind is Values:
        yield f"a scale of {plan.activations.label} inputs that holds for all tokens"


def opened(path: Path, job: Job) -> Files:
    """Statistics of the job's model. Raises CheckpointError: damaged, or measured on another model."""
    if is_stats_folder(path):
        folder = StatsFolder(path)
        files: Files = Sharded(folder)
        whole = folder.about
    elif is_imatrix(path):
        sums, about = read_importance(path, job.checkpoint)
        return Compact(sums, sha256(path), about, partial=True)
    else:
        stats, whole = read_stats(path)
        files = Compact(stats, sha256(path), whole["calibration"])
    if whole["fingerprint"] != job.plan.source_fingerprint:
        raise CheckpointError(
            f"the statistics in {path} were measured on another model",
            wanted=job.checkpoint.source,
            found=whole["model"],
        )
    return files
