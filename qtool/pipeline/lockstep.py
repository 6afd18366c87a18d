"""Several recipes for one model, solved side by side: block by block, each on hidden states of its own.

What a recipe quantizes changes what later blocks read, so that hidden states are its own, and its bytes are those that
it gets alone. What methods compare them with, the unquantized model, is the same for all and is run once; so is all of
the walk for recipes that measure nothing but that model (`propagate: float`). What is solved goes into the work folders
of the recipes, whose runs then go on from there as if they had been interrupted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial

from qtool.calibrate.once import OnceWalker
from qtool.calibrate.reference import Reference, SharedReference
from qtool.calibrate.walker import Walker
from qtool.pipeline import quantize
from qtool.pipeline.content import content_of
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.loop import together
from qtool.pipeline.memory import peak_bytes
from qtool.pipeline.prepare import Job
from qtool.pipeline.shared import tokens_key
from qtool.pipeline.statistics import Alone, statistics_for
from qtool.pipeline.tokens import tokens_of
from qtool.pipeline.units import comparable, steps, units
from qtool.pipeline.work import Record, identity, open_work
from qtool.report.model import StageEntry
from qtool.stats._base import Statistic
from qtool.stats.drift import Drift
from qtool.store.files import check_free

STAGE = "quantize, side by side with other recipes"


class Joined:
    """One of the runs.

    Args:
        options: what was asked for.
        job: the run.
        solving: gives its units, as they are finished.
    """

    def __init__(self, options: quantize.QuantizeOptions, job: Job, solving: Iterator[tuple[object, Record]]) -> None:
        self.options, self.solving, self.todo, self.seconds = options, solving, steps(job.plan), 0.0
        self.done = 0

    @property
    def next_block(self) -> int:
        """The block that it comes to next; what is outside of blocks belongs to the one before."""
        here = [unit.block for unit in self.todo[: self.done + 1] if unit.block is not None]
        return here[-1] if here else -1

    def proceed(self) -> None:
        """Solves the next unit."""
        begin = time.monotonic()
        next(self.solving)
        self.seconds += time.monotonic() - begin
        self.done += 1


def solve_side_by_side(several: Sequence[quantize.QuantizeOptions], listener: Listener) -> None:
    """Solves what can be solved side by side; nothing if that are fewer than two recipes.

    Args:
        several: what each run was asked for; all share one `Shared`.
        listener: called with events of progress.

    Raises:
        QtoolError: see `qtool.pipeline.quantize.run`.
    """
    several[0].shared.once("checked", partial(quantize.check, several[0]))
    jobs = [(o, o.shared.once(("job", o.out), partial(quantize.prepared, o, None))) for o in several]
    joining = [(options, job) for options, job in jobs if joins(job, options)]
    if len(joining) < 2:
        return
    beside = Beside([job for _, job in joining])
    with ExitStack() as stack:
        runs = [run for o, job in joining if (run := begun(o, job, beside, stack, listener))]
        count = sum(len(run.todo) for run in runs)
        while left := [run for run in runs if run.done < len(run.todo)]:
            now = min(left, key=lambda run: run.next_block)
            text = f"{now.todo[now.done].name} of {now.options.out.name}"
            now.proceed()
            listener(Event("quantize", sum(run.done for run in runs), count, text))
    for run in runs:
        entry = StageEntry(name=STAGE, seconds=run.seconds, peak_bytes=peak_bytes())
        run.options.shared.stages[run.options.out] = entry


def begun(
    options: quantize.QuantizeOptions, job: Job, beside: Beside, stack: ExitStack, listener: Listener
) -> Joined | None:
    """One of the runs with its work folder open; None: its result is there."""
    source = statistics_for(job, None, listener, beside)
    run = identity(job, source.digest, content_of(job))
    if not options.overwrite and quantize.finished(options.out, job, run):
        return None
    check_free(options.out, options.overwrite)
    work = stack.enter_context(open_work(options.out.with_name(f"{options.out.name}.work"), job, run, listener))
    solving = stack.enter_context(closing(together(steps(job.plan), job, work, source, None)))
    return Joined(options, job, solving)


def joins(job: Job, options: quantize.QuantizeOptions) -> bool:
    """Whether a run walks the model as it was given, layer by layer.

    Transforms and budgets come first otherwise; methods that train blocks want all samples of the unquantized model.
    """
    recipe, parts = job.plan.recipe, list(units(job.plan))
    alone = recipe.transforms or recipe.budget or options.stats or options.imatrix or job.ranks.size > 1
    return not alone and any(unit.walked for unit in parts) and not any(unit.blockwise for unit in parts)


class Beside(Alone):
    """Unquantized models of several runs: one for all that need the same.

    Args:
        jobs: the runs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        inputs = (found for job in jobs for unit in units(job.plan) for found in unit.inputs().items())
        self.compared = frozenset(reads for reads, plans in inputs if Drift in comparable(plans))
        self.alike = Counter(key for job in jobs if (key := original_key(job)))
        self.walkers, self.references = dict[object, Walker](), dict[object, Reference]()

    def walker(self, job: Job) -> Walker:
        """See `Alone.walker`; one for runs that measure the same on the unquantized model alone."""
        if (key := original_key(job)) is None or self.alike[key] < 2:
            return super().walker(job)
        if key not in self.walkers:
            everything = job.plan.recipe.calibration.experts == "all"
            self.walkers[key] = OnceWalker(job.checkpoint, job.device, job.dtype, everything, wanted=measured(job))
        return self.walkers[key]

    def reference(self, job: Job, walker: Walker) -> Reference:
        """See `Alone.reference`; begun where there is none yet."""
        if (key := place_key(job)) not in self.references:
            self.references[key] = SharedReference(walker, tokens_of(job), self.compared)
        return self.references[key]


def measured(job: Job) -> dict[int, dict[str, frozenset[type[Statistic]]]]:
    """What is measured in each block, by `Module.reads`."""
    blocks = [(unit.block, unit.inputs()) for unit in units(job.plan) if unit.block is not None]
    return {i: {reads: need for reads, p in inputs.items() if (need := comparable(p))} for i, inputs in blocks}


def place_key(job: Job) -> tuple[object, ...]:
    """The same for runs of the same tokens, computed alike."""
    calibration = job.plan.recipe.calibration
    return tokens_key(calibration), calibration.experts, job.device, job.dtype


def original_key(job: Job) -> tuple[object, ...] | None:
    """The same for runs that measure the same on the unquantized model alone; None: this one does something else."""
    recipe = job.plan.recipe
    if recipe.calibration.propagate != "float" or recipe.calibration.token_weights or recipe.kv_cache:
        return None
    needs = [(i, reads, need) for i, found in measured(job).items() for reads, need in found.items()]
    return *place_key(job), tuple(needs)
