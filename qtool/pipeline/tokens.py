"""The calibration tokens of a run, in all of its processes."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.calibrate.documents import Tell
from qtool.calibrate.tokens import load_tokens
from qtool.pipeline.prepare import Job
from qtool.pipeline.shared import tokens_key


def tokens_of(job: Job, tell: Tell = lambda _: None) -> Tensor:
    """What the first process loads, int64 [samples, length]; for `tell` and errors, see `load_tokens`."""
    if not job.ranks.first:
        return job.ranks.broadcast(torch.empty(0))
    calibration = job.plan.recipe.calibration

    def load() -> Tensor:
        return load_tokens(calibration, job.original, tell, job.device)

    return job.ranks.broadcast(job.shared.once(("tokens", tokens_key(calibration)), load))
