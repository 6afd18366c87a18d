"""What sizes of a model are worth: for some budgets at once, how far each best plan is expected to take it.

Costs are found out once, and are the same for all budgets; a budget more only has to be solved. What is expected is the
sum of costs, the KL divergence to second order; nothing is run for it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtool.allocate.decisions import picked
from qtool.allocate.knapsack import total
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.budget import rewritten, sizing_card
from qtool.pipeline.card import origin
from qtool.pipeline.events import Listener
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import Job
from qtool.pipeline.summarize import parameters

BUDGETS = 10


@dataclass(frozen=True)
class CurvePoint:
    """The best plan of a size.

    Attributes:
        nbytes: of the artifact's files with tensors, at most.
        bits: the same per weight of the model.
        kld: expected divergence, nats per token.
        formats: weights in each format, of those that are open; largest first.
    """

    nbytes: int
    bits: float
    kld: float
    formats: dict[str, int]


def curve(job: Job, scores: Path | None, listener: Listener, count: int = BUDGETS) -> tuple[CurvePoint, ...]:
    """Budgets from the smallest file to the one with the best formats, evenly apart.

    Args:
        job: the run, whose recipe has a budget; its limit does not matter.
        scores: see `qtool.pipeline.budget.divided`.
        listener: called with events of progress.
        count: how many.

    Raises:
        QtoolError: see `qtool.pipeline.allocate.allocated` and `transformed`.
    """
    card = sizing_card(job, origin(job.original).base_model)
    with tempfile.TemporaryDirectory() as folder:
        job, edits = rewritten(job, Path(folder), listener)
        allocator, place = Allocator(job, card), scores or Path(folder) / "scores.safetensors"
        allocator.score(*tokens_for(job), place, bool(scores), edits, listener)
    least = allocator.size(tuple(int(g.sizes.argmin()) for g in allocator.groups))
    most = allocator.size(tuple(int(np.lexsort((g.sizes, g.costs))[0]) for g in allocator.groups))
    limits = [least + (most - least) * i // max(1, count - 1) for i in range(count)]
    return tuple(point(allocator, limit) for limit in dict.fromkeys(limits))


def point(allocator: Allocator, limit: int) -> CurvePoint:
    """The best plan with so many bytes."""
    chosen, formats = allocator.fitting(limit), Counter[str]()
    for plan in (p for option in picked(allocator.open, chosen) for p in option):
        formats[plan.label] += plan.module.shape[0] * plan.module.shape[1]
    nbytes = allocator.size(chosen)
    bits = 8 * nbytes / parameters(allocator.job.original)
    return CurvePoint(nbytes, bits, total(allocator.groups, chosen), dict(formats.most_common()))
