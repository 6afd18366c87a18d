"""Which samples a budget is divided on, and which it is judged by."""

from __future__ import annotations

from torch import Tensor

from qtool.calibrate.tokens import load_tokens
from qtool.pipeline.prepare import Job


def tokens_for(job: Job) -> tuple[Tensor, Tensor]:
    """Samples to score on, int64 [S, T], and others that neither these nor the run's calibration contain."""
    calibration, budget = job.plan.recipe.calibration.model_copy(update={"continued": 0}), job.plan.recipe.budget
    assert budget is not None
    used = load_tokens(calibration, job.original) if any(p.needs for p in job.plan.layers) else None
    count = budget.samples + budget.held_out + (0 if used is None else len(used))
    drawn = load_tokens(calibration.model_copy(update={"samples": count, "seed": calibration.seed + 1}), job.original)
    used_rows = set() if used is None else {row.numpy().tobytes() for row in used}
    fresh = [i for i, row in enumerate(drawn) if row.numpy().tobytes() not in used_rows]
    held_out = fresh[: budget.held_out]
    rest = [i for i in range(len(drawn)) if i not in set(held_out)]
    return drawn[rest[: budget.samples]], drawn[held_out]
