"""What would fail after the plan is made: texts, tokenizer, disk, hub. Nothing of the weights is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from qtool.calibrate.documents import documents
from qtool.calibrate.tokenizer import load_tokenizer
from qtool.errors import QtoolError
from qtool.evaluate.twin import prove_twin
from qtool.pipeline import evaluate
from qtool.pipeline.prepare import Job
from qtool.pipeline.upload import check_repository
from qtool.recipe.schema import Calibration
from qtool.report.units import size
from qtool.store.hub import refuse_stranger


def check(job: Job, place: Path, push_to: str | None = None) -> list[str]:
    """Tries what a run will need, and returns what is wrong with it, a line each.

    Args:
        job: the run.
        place: the folder that the result goes into, or one on the same disk.
        push_to: hub repository that it will be uploaded to.
    """
    found = []
    steps: list[Callable[[Job], None]] = [_evaluation, _calibration, _conversion]
    if push_to:
        steps.append(partial(_hub, push_to))
    for step in steps:
        try:
            step(job)
        except QtoolError as error:
            found.append(str(error))
    return [*found, *_disk(job, place)]


def _hub(repo: str, _: Job) -> None:
    check_repository(repo)
    refuse_stranger(repo)


def _evaluation(job: Job) -> None:
    evaluate.check(job.plan.recipe.eval)
    if job.plan.recipe.eval:
        load_tokenizer(job.checkpoint)


def _calibration(job: Job) -> None:
    """Loads the tokenizer and reads the first document of every source, if anything wants data."""
    calibration = job.plan.recipe.calibration
    cache = job.plan.recipe.kv_cache
    wanted = job.plan.recipe.budget is not None or (cache is not None and cache.static)
    if not wanted and not any(p.needs for p in job.plan.layers):
        return
    tokenizer = load_tokenizer(job.checkpoint)
    for source in _sources(calibration):
        if source != "self":
            next(documents(source, tokenizer, calibration.chat_template), None)


def _conversion(job: Job) -> None:
    """Converts a small random model of this kind, and has another program run it."""
    for artifact in job.artifacts.values():
        prove_twin(artifact, job.checkpoint)


def _sources(calibration: Calibration) -> Iterator[str]:
    data = calibration.data
    yield from (data,) if isinstance(data, str) else (source.data for source in data)


def _disk(job: Job, place: Path) -> list[str]:
    """The work folder and every artifact hold the model once."""
    wanted = job.plan.predicted_bytes * (1 + len(job.artifacts))
    free = shutil.disk_usage(place).free
    if free >= wanted:
        return []
    return [f"the disk of {place} is too small: wanted {size(wanted)}, found {size(free)} free; free some space"]
