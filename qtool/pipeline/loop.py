"""The loop over units: each is solved and saved, or taken over from an earlier run.

Units whose inputs are measured behind those before them are solved by all processes together, one after the other. Of
units that depend on no others, each process solves some.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

from qtool.calibrate.attention import AttentionErrors
from qtool.pipeline.entries import kept_entry, mean_db
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.profile import Profile
from qtool.pipeline.saving import Saving
from qtool.pipeline.solver import UnitSolver
from qtool.pipeline.statistics import Statistics
from qtool.pipeline.units import Unit, steps
from qtool.pipeline.work import Record, Work
from qtool.report.model import BlockEntry, CacheEntry, LayerEntry


def solve_all(
    job: Job, work: Work, source: Statistics, listener: Listener, profile: Profile | None = None
) -> tuple[tuple[LayerEntry, ...], tuple[CacheEntry, ...], tuple[BlockEntry, ...]]:
    """Goes through the plan unit by unit; what an earlier run finished is only walked through.

    Args:
        job: the run.
        work: where finished units are.
        source: of statistics.
        listener: called with events of progress.
        profile: of one of the units.
    """
    caches, blocks = list[CacheEntry](), list[BlockEntry]()
    entries = {p.module.name: kept_entry(p) for p in job.plan.layers if p.format is None}
    todo = steps(job.plan)
    earlier = f"{len(work.finished)} finished earlier" if work.finished else ""
    listener(Event("quantize", 0, len(todo), earlier))
    alone = source.independent and job.ranks.size > 1
    if profile:
        mine = todo[job.ranks.share(len(todo))] if alone else todo
        profile.choose([unit.name for unit in mine if unit.name not in work.finished])
    solved = apart if alone else together
    for done, (unit, record) in enumerate(solved(todo, job, work, source, profile), 1):
        entries |= {entry.name: entry for entry in record.layers}
        caches += [record.cache] if record.cache else []
        blocks += record.blocks
        error = mean_db(record.layers)
        listener(Event("quantize", done, len(todo), unit.name, {} if error is None else {"error_db": error}))
    work.settle()
    job.ranks.barrier()  # until all is saved, which every process may read from here on
    return tuple(entries[p.module.name] for p in job.plan.layers), tuple(caches), tuple(blocks)


def together(
    todo: Sequence[Unit], job: Job, work: Work, source: Statistics, profile: Profile | None
) -> Generator[tuple[Unit, Record], None, None]:
    """Solves unit by unit; the first process saves them."""
    with Saving(job.device) as saving:
        for done, unit in enumerate(todo, 1):
            propagate = any(later.walked and later.name not in work.finished for later in todo[done:])
            with profile.unit(unit.name) if profile else nullcontext():
                record, solver = solve_unit(unit, job, work, source, propagate)
            if solver and job.ranks.first:
                cached = source.cached[0] if unit.cache and source.cached else None
                saving(partial(work.store, unit, solver, record, cached), partial(work.enter, unit))
            yield unit, record


def apart(
    todo: Sequence[Unit], job: Job, work: Work, source: Statistics, profile: Profile | None
) -> Iterator[tuple[Unit, Record]]:
    """Solves as many units at a time as there are processes, which store them; the first one keeps the list."""
    ranks = job.ranks
    for start in range(0, len(todo), ranks.size):
        made = []
        for unit in todo[start : start + ranks.size][ranks.rank : ranks.rank + 1]:
            with profile.unit(unit.name) if profile else nullcontext():
                record, solver = solve_unit(unit, job, work, source, propagate=False)
            stored = work.store(unit, solver, record) if solver else None
            made.append((unit, record, stored))
        for unit, record, stored in chain(*ranks.gather(made)):
            if stored and ranks.first:
                work.enter(unit, stored)
            yield unit, record


def solve_unit(
    unit: Unit, job: Job, work: Work, source: Statistics, propagate: bool
) -> tuple[Record, UnitSolver | None]:
    """Solves a unit, unless an earlier run finished it: its record, and what is to be saved.

    Args:
        unit: what to solve.
        job: the run.
        work: where finished units are.
        source: of statistics.
        propagate: whether hidden states have to go on behind it, because a later unit is measured there.
    """
    if (finished := work.record(unit)) is not None:
        if propagate:
            source.visit(unit, work, propagate)
        return finished, None
    solver = UnitSolver(unit, job, source.ranks, alone=source.independent)
    source.visit(unit, solver, propagate)
    solver.stats.clear()  # or they would be in memory until the unit is saved
    cached = source.cached if unit.cache else None
    cache = cache_entry(unit, cached[1]) if cached else None
    return Record(layers=tuple(solver.entries.values()), cache=cache, blocks=tuple(solver.blocks)), solver


def cache_entry(unit: Unit, errors: AttentionErrors) -> CacheEntry:
    """What the report says about the KV cache of a block."""
    assert unit.block is not None
    assert unit.cache is not None
    return CacheEntry(
        block=unit.block,
        keys=unit.cache.of_keys,
        values=unit.cache.values.label,
        scores_error_db=errors.scores_db,
        outputs_error_db=errors.outputs_db,
    )
