"""Divides the budget of a run; where two plans are nearly as good, by what methods make of both.

Codes that a method chooses are better than rounded ones, and not equally so in every format. So what rounded models
say of two plans that are close is no verdict: both are carried out, each in a work folder, and the better one is what
the run goes on with; its blocks are finished then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qtool.checkpoint._base import Checkpoint
from qtool.pipeline.allocate import allocated
from qtool.pipeline.allocator import Allocator, Contest
from qtool.pipeline.budget import sizing_card
from qtool.pipeline.card import origin
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.loop import solve_all
from qtool.pipeline.prepare import Job
from qtool.pipeline.statistics import statistics_for
from qtool.pipeline.stopwatch import Stopwatch
from qtool.pipeline.transform import Made, keep_edits
from qtool.pipeline.trial import Divergence
from qtool.pipeline.work import identity, open_work
from qtool.report.model import AllocationEntry
from qtool.store.files import storage_errors


class Dividing(NamedTuple):
    """What of a run's options a budget asks for.

    Attributes:
        base_model, license: see `origin`.
        imatrix, stats: statistics to use instead of running the model.
        scores: where scores are kept, see `allocated`.
        strict: refuse scores of something else.
        content: reads the source once, and says what `read_content` does.
    """

    base_model: str | None
    license: str | None
    imatrix: Path | None
    stats: Path | None
    scores: Path
    strict: bool
    content: Callable[[], str]


def decided(
    job: Job, asked: Dividing, made: Made, place: Path, watch: Stopwatch, listener: Listener
) -> tuple[Job, AllocationEntry | None]:
    """The run with its budget divided, if it has one, and how that came about.

    Args:
        job: the run.
        asked: how.
        made: what transforms did.
        place: its work folder.
        watch: measures how long it takes.
        listener: called with events of progress.

    Raises:
        QtoolError: see `allocated`, `statistics_for`, `solve_all`.
    """
    if job.plan.recipe.budget is None:
        return job, None
    with watch.stage("allocate"):
        source = origin(job.original, asked.base_model, asked.license)
        card = sizing_card(job, source.base_model, asked.imatrix)
        allocator, contest = allocated(job, card, asked.scores, asked.strict, made.run, listener)
        if contest.close and allocator.confirms:
            stored = asked.stats or asked.imatrix
            contest = CarriedOut(allocator, made, asked.content(), stored, listener).judge(contest, place)
    return allocator.decided(contest.taken), allocator.entry(contest)


class CarriedOut:
    """Carries plans out, and measures them.

    Args:
        allocator: knows them.
        made: what transforms did.
        content: of the source, see `read_content`.
        stored: statistics to use, see `statistics_for`.
        listener: called with events of progress.
    """

    def __init__(self, allocator: Allocator, made: Made, content: str, stored: Path | None, listener: Listener) -> None:
        self.allocator, self.made, self.content = allocator, made, content
        self.stored, self.listener = stored, listener

    def judge(self, contest: Contest, place: Path) -> Contest:
        """The same contest, with divergences of carried out plans; the work of the better one is in the work folder."""
        assert contest.other is not None
        beside = place.with_name(f"{place.stem}.other.work")
        self.listener(Event("allocate", 0, 0, f"{contest.name} is nearly as good: carrying both out"))
        own, other = self.measure(contest.own, place), self.measure(contest.other, beside)
        found = contest._replace(own_kld=own, other_kld=other, carried_out=True)
        with storage_errors(beside):
            if found.fell_back and os.path.exists(beside):
                shutil.rmtree(place, ignore_errors=True)
                beside.rename(place)
            shutil.rmtree(beside, ignore_errors=True)
        return found

    def measure(self, chosen: tuple[int, ...], folder: Path) -> Divergence:
        """The divergence of a plan that is carried out in a folder; known ones are not carried out again."""
        job = self.allocator.decided(chosen)
        source = statistics_for(job, self.stored, self.listener)
        run = identity(job, source.digest, self.content, self.made.edits)

        def model() -> Checkpoint:
            with open_work(folder, job, run, self.listener) as work:
                if self.made.run:
                    keep_edits(self.made, folder)
                solve_all(job, work, source, self.listener)
                return work.model()

        return self.allocator.known(chosen, json.dumps(run, sort_keys=True), model)
