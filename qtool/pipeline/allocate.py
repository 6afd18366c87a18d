"""Divides a recipe's budget: scores every option once, solves, and measures whether that beats uniform plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.pipeline.allocator import Allocator, Contest
from qtool.pipeline.events import Listener
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.near_enough import small_enough
from qtool.pipeline.prepare import Job
from qtool.pipeline.swaps import swapped


def allocated(
    job: Job, card: Mapping[str, Any], place: Path, strict: bool, edits: str, listener: Listener
) -> tuple[Allocator, Contest]:
    """Finds out what options cost, and divides a budget.

    Args:
        job: the run, whose recipe has a budget.
        card: what the artifact's writer will be given, as far as it goes into files with tensors.
        place: file of scores: read if it is there, written otherwise; or a folder of such files, each about something.
        strict: refuse a file about something else.
        edits: what identifies the transforms of the model.
        listener: called with events of progress.

    Raises:
        PlanError: the budget is too small, has no limit, or leaves nothing open.
        CheckpointError, MissingExtra, HubError, NumericsError, StorageError: see `load_tokens`, `Pricing`, `ScoreFile`.
    """
    allocator = Allocator(job, card)
    allocator.refuse_too_small()
    samples, held_out = tokens_for(job)
    allocator.score(samples, held_out, place, strict, edits, listener)
    return allocator, divided(allocator)


def divided(allocator: Allocator) -> Contest:
    """Decides everything, once options have scores."""
    limit = allocator.limit
    if limit is not None:
        own = swapped(allocator, allocator.fitting(limit), limit)
    else:
        own = small_enough(allocator, allocator.budget.kld or 0.0)
    found, other = allocator.measure(own), allocator.best_uniform(allocator.size(own) if limit is None else limit)
    return Contest(own, found, *other, allocator.measure(other[1])) if other else Contest(own, found)
