"""A plan whose budget is divided, without carrying it out; and what its files' sizes depend on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtool.errors import VerifyError
from qtool.pipeline.allocate import allocated
from qtool.pipeline.card import origin
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.stored import opened
from qtool.pipeline.transform import transformed
from qtool.report.model import AllocationEntry, ArtifactEntry


def sizing_card(job: Job, base_model: str, imatrix: Path | None = None) -> dict[str, Any]:
    """What of the model card goes into files with tensors, before anything else is known of it."""
    importance = dict(opened(imatrix, job).about) if imatrix else None
    return {"base_model": base_model, "recipe_name": job.plan.recipe.name, "importance": importance}


def divided(job: Job, scores: Path | None, listener: Listener) -> tuple[Job, AllocationEntry]:
    """The run with every layer decided, as `quantize` would decide it.

    Args:
        job: the run, whose recipe has a budget.
        scores: file to keep what was found out, or a folder of such files; None: nothing is kept.
        listener: called with events of progress.

    Raises:
        QtoolError: see `allocated` and `transformed`.
    """
    card = sizing_card(job, origin(job.original).base_model)
    with tempfile.TemporaryDirectory() as folder:
        job, edits = rewritten(job, Path(folder), listener)
        place = scores or Path(folder) / "scores.safetensors"
        allocator, contest = allocated(job, card, place, bool(scores), edits, listener)
        if contest.close and allocator.confirms:
            text = f"{contest.name} is nearly as good, rounded: a run carries both plans out, and takes the better"
            listener(Event("allocate", 0, 0, text))
        return allocator.decided(contest.taken), allocator.entry(contest)


def rewritten(job: Job, folder: Path, listener: Listener) -> tuple[Job, str]:
    """The run behind the transforms of its recipe, and what identifies these."""
    if not job.plan.recipe.transforms:
        return job, ""
    job, made = transformed(job, folder, None, listener)
    return job, made.run


def refuse_too_large(artifacts: Sequence[ArtifactEntry], allocation: AllocationEntry | None) -> None:
    """Raises VerifyError: the files with tensors have more bytes than the budget allows."""
    if allocation is None or allocation.limit is None:
        return
    suffixes = (".gguf", ".safetensors", ".safetensors.index.json")
    found = sum(f.nbytes for a in artifacts for f in a.files if f.name.endswith(suffixes))
    if found > allocation.limit:
        raise VerifyError("the artifact is larger than its budget", wanted=allocation.limit, found=found)
