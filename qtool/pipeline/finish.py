"""Stages behind the block loop: each looks at the whole quantized model and replaces some of its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qtool.calibrate.tokens import load_tokens
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.errors import CheckpointError
from qtool.pipeline.events import Event, Listener, remarks
from qtool.pipeline.prepare import Job
from qtool.pipeline.stopwatch import Stopwatch
from qtool.plan import Plan
from qtool.report.model import FinishEntry, course_entries
from qtool.report.summary import measured
from qtool.stages._base import Stage, StageResult, StageTask
from qtool.store.overlay import Overlaid, read_overlay, write_overlay


def finish(
    job: Job, model: QuantizedCheckpoint, folder: Path, run: Mapping[str, Any], watch: Stopwatch, listener: Listener
) -> tuple[QuantizedCheckpoint, tuple[FinishEntry, ...]]:
    """The model behind all stages of the recipe, and what the report says about them.

    Args:
        job: the run.
        model: all blocks are quantized.
        folder: the work folder; a stage that an earlier run finished there is taken over.
        run: what identifies the run, see `pipeline.work.identity`.
        watch: counts each.
        listener: called with events of progress.

    Raises:
        CheckpointError, NumericsError: a stage gives what does not fit the model; see `Overlaid` and `keep_shared`.
        StorageError: its result cannot be stored.
    """
    stages = cast(tuple[Stage, ...], job.plan.recipe.finish)
    tokens, entries = None, list[FinishEntry]()
    if any(stage.needs_tokens for stage in stages):
        tokens = load_tokens(job.plan.recipe.calibration, job.original, remarks(listener, "finish"), job.device)
    key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    for i, stage in enumerate(stages):
        name = f"finish {stage.name()}"
        key = key_of(key, job, stage, tokens if stage.needs_tokens else None)
        with watch.stage(name):
            path = folder / f"finish-{i}-{stage.name()}.safetensors"
            found = left_behind(path, key, listener)
            if found is None:
                found = solved(stage, task_of(job, model, tokens if stage.needs_tokens else None, listener, name))
                keep_shared(job.plan, model, Overlaid(model, found.params, found.tensors, name), found, name)
                write_overlay(path, found.params, found.tensors, found.about, key, found.course)
            model = Overlaid(model, found.params, found.tensors, name)
        changed = len(found.params) + len(found.tensors)
        course = course_entries(found.course)
        entries.append(FinishEntry(name=stage.name(), changed=changed, about=dict(found.about), course=course))
        listener(Event(name, 1, 1, measured(entries[-1])))
    return model, tuple(entries)


def keep_shared(
    plan: Plan, before: QuantizedCheckpoint, after: QuantizedCheckpoint, found: StageResult, name: str
) -> None:
    """Refuses a stage that tells matrices apart which runtimes merge into one with one scale for all of it.

    Raises:
        CheckpointError: a parameter had one value in a whole set, and has several now.
    """
    sets: dict[str, list[str]] = {}
    for p in plan.layers:
        if p.format and p.module.fused:
            sets.setdefault(p.module.fused, []).append(p.module.name)
    for fused, members in sets.items():
        if any(module in found.params for module in members):
            for param, value in one_valued(before, members).items():
                if one_valued(after, members).get(param) is None:
                    wanted = f"one value for all of {fused}, as {value!r} was"
                    raise CheckpointError(f"{name}: {param}", wanted=wanted, found="several")


def one_valued(model: QuantizedCheckpoint, members: Sequence[str]) -> dict[str, float]:
    """Parameters that have one value in all of these matrices."""
    params = [model.matrix(module).quantized.params for module in members]
    values = {param: torch.cat([own[param].float().flatten() for own in params if param in own]) for param in params[0]}
    return {param: float(found[0]) for param, found in values.items() if bool((found == found[0]).all())}


def key_of(before: str, job: Job, stage: Stage, tokens: Tensor | None) -> str:
    """Hex digest of all that a stage's result depends on: the run, the stages before, itself, what it reads."""
    content = json.dumps([before, stage.spelled(), str(job.device), str(job.dtype)], sort_keys=True)
    data = b"" if tokens is None else tokens.numpy().tobytes()
    return hashlib.sha256(content.encode() + data).hexdigest()


def left_behind(path: Path, key: str, listener: Listener) -> StageResult | None:
    """What an earlier run found; None if it has to be found, which is said if that is because a file is damaged."""
    try:
        found = read_overlay(path, key)
    except CheckpointError as error:
        listener(Event("finish", 0, 0, f"{path.name} is made again: {error}", warning=True))
        return None
    return found and StageResult(*found)


def task_of(job: Job, model: QuantizedCheckpoint, tokens: Tensor | None, listener: Listener, name: str) -> StageTask:
    """What a stage is given."""

    def progress(done: int, total: int, message: str = "") -> None:
        listener(Event(name, done, total, message))

    return StageTask(job.original, job.checkpoint, model, job.plan, tokens, job.device, job.dtype, progress)


def solved(stage: Stage, task: StageTask) -> StageResult:
    """What a stage finds, on the CPU."""
    found = stage.run(task)
    params = {module: {name: t.detach().cpu() for name, t in own.items()} for module, own in found.params.items()}
    tensors = {name: t.detach().cpu() for name, t in found.tensors.items()}
    return StageResult(params, tensors, found.about, found.course)
