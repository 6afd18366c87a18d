"""Rewrites of the whole model before it is quantized: every transform of a recipe, at every site, block by block.

What transforms measure is measured on the original model, as the transforms before them left it, in a pass of its own.

Shape letters: S samples, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.edits import Edit, read_edits, write_edits
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import CheckpointError, PlanError
from qtool.pipeline.attempt import Attempt, with_ops
from qtool.pipeline.events import Listener
from qtool.pipeline.learning import carried_out
from qtool.pipeline.prepare import Job
from qtool.pipeline.tokens import tokens_of
from qtool.pipeline.work import code_digest
from qtool.plan import LayerPlan
from qtool.plan.check import check
from qtool.plan.findings import Findings
from qtool.store.files import new_file

FILE = "transforms.safetensors"


@dataclass(frozen=True)
class Made:
    """What transforms made of a model.

    Attributes:
        edits: in order.
        run: what identifies a run that makes the same.
        notes: what the report says of them.
    """

    edits: tuple[Edit, ...] = ()
    run: str = ""
    notes: tuple[str, ...] = ()


def transformed(job: Job, folder: Path, stored: Path | None, listener: Listener) -> tuple[Job, Made]:
    """The run with its model rewritten, and how.

    Args:
        job: the run, whose recipe has transforms.
        folder: the work folder, where an interrupted run may have left what it found.
        stored: statistics that the user wants to be used.
        listener: called with events of progress.

    Raises:
        PlanError: statistics of the model as it was say nothing about the rewritten one.
        CheckpointError, MissingExtra, HubError: see `load_tokens`.
    """
    names = ", ".join(transform.name() for transform in job.plan.recipe.transforms)
    if stored:
        line = f"they are of the model as it was before {names}; run without them"
        raise PlanError([line], f"statistics in {stored}")
    needs = any(transform.needs for transform in job.plan.recipe.transforms)
    tokens = tokens_of(job) if needs else None
    run = key(job, tokens)
    found = job.ranks.broadcast(left_behind(folder / FILE, run) if job.ranks.first else None)
    made = found or rewritten(job, tokens, run, listener)
    rounded_anyway = {p.module.name for p in job.plan.layers if p.format}
    model = Rewritten(job.original, made.edits, wide=rounded_anyway)
    layers = with_ops(job.plan.layers, model)
    if any(transform.tried for transform in job.plan.recipe.transforms):
        refuse_uncarried(job, layers, model)
    plan = replace(job.plan, layers=layers, warnings=(*job.plan.warnings, *made.notes))
    return replace(job, checkpoint=model, plan=plan), made


def rewritten(job: Job, tokens: Tensor | None, run: str, listener: Listener) -> Made:
    """What the transforms of a recipe make of a model, one behind the other."""
    made = Made(run=run)
    for transform in job.plan.recipe.transforms:
        if transform.tried and tokens is not None:
            attempt = Attempt(job, transform.tried, made.edits, listener)
            edits, notes = tuple(attempt.edits(tokens)), attempt.notes
        else:
            work = carried_out(job, transform, made.edits, listener)
            edits, notes = tuple(work.edits(tokens)), work.notes
        made = replace(made, edits=(*made.edits, *edits), notes=(*made.notes, *notes))
    return made


def refuse_uncarried(job: Job, layers: Sequence[LayerPlan], model: Checkpoint) -> None:
    """Refuses operations that were chosen and that an artifact cannot hold. Raises PlanError."""
    findings = Findings(job.plan.recipe.layers)
    check(layers, job.plan.recipe.kv_cache, model, job.artifacts, findings)
    if lines := findings.lines():
        raise PlanError(lines, f"recipe {job.plan.recipe.name} does not fit {job.original.source}")


def key(job: Job, tokens: Tensor | None) -> str:
    """Hex digest of everything that edits depend on."""
    found = hashlib.sha256(f"{code_digest()} {job.plan.fingerprint()} {job.device} {job.dtype}".encode())
    if tokens is not None:
        found.update(tokens.numpy().tobytes())
    return found.hexdigest()


def left_behind(path: Path, run: str) -> Made | None:
    """What a run with this key left; None if that is nothing, or not whole."""
    try:
        found = Made(*read_edits(path))
    except CheckpointError:
        return None
    return found if found.run == run else None


def keep_edits(made: Made, folder: Path) -> None:
    """Leaves edits in the work folder, for a run that continues this one. Raises StorageError."""
    with new_file(folder / FILE) as partial:
        write_edits(made.edits, partial, made.run, made.notes)
