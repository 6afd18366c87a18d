"""Has a quantized model, and what it was made from, answer tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qtool import __version__
from qtool.checkpoint._base import Checkpoint
from qtool.evaluate.continuations import Scorer, llama_cpp, streamed
from qtool.evaluate.gates import judge_tasks, validate_task_gates
from qtool.evaluate.result import TaskEvaluation
from qtool.evaluate.run import gguf_file
from qtool.evaluate.tasks import Asked, answers, compared, harness_version, longest, task_names
from qtool.pipeline.content import refuse_changed
from qtool.pipeline.evaluate import EXACT, opened, tell, updated_place
from qtool.pipeline.events import Listener, silent
from qtool.pipeline.prepare import device_of, dtype_of
from qtool.pipeline.update import update_tasks
from qtool.store.files import check_file, new_file
from qtool.store.names import output_path


@dataclass(frozen=True)
class TaskOptions:
    """What `qtool eval --tasks` was asked to do.

    Attributes:
        artifact: the model under test: an artifact, or any checkpoint.
        baseline: the model to compare with; None: nothing is compared.
        tasks, fewshot, limit: see `qtool.evaluate.tasks.Asked`.
        runtime: what runs the artifact; the baseline is run here in any case.
        gates: percentage points that a task may lose, by its name with "_drop" behind it.
        device: "auto", "cpu" or "cuda".
        dtype: of forward passes; "auto" is float32.
        out: JSON file to write.
        update: add the result to the artifact's report and model card.
    """

    artifact: str | Checkpoint
    baseline: str | Checkpoint | None
    tasks: tuple[str, ...]
    fewshot: int | None = None
    limit: int | None = None
    runtime: Literal["qtool", "llama.cpp"] = "qtool"
    gates: Mapping[str, float] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None
    update: bool = False


def run(options: TaskOptions, listener: Listener = silent) -> TaskEvaluation:
    """Opens the models, has them answer, writes the JSON file if one is wanted.

    Raises:
        QtoolError: of most kinds; see `qtool.evaluate.tasks.answers`.
    """
    harness, asked = harness_version(), Asked(options.tasks, options.fewshot, options.limit)
    place = updated_place(options)
    out = options.out and output_path(options.out, options.artifact, options.baseline or options.artifact)
    if out:
        check_file(out)
    validate_task_gates(options.gates, task_names(asked), compared=options.baseline is not None)
    model, baseline = opened(options.artifact), None if options.baseline is None else opened(options.baseline)
    for source in (model.source, *([baseline.source] if baseline else [])):
        refuse_changed(source, listener)
    own = answers(model, scorer(model, options, listener, options.runtime), asked)
    base = answers(baseline, scorer(baseline, options, listener, "qtool"), asked) if baseline else {}
    found = TaskEvaluation(
        scores=tuple(score for name in own for score in compared(name, own[name], base.get(name))),
        fewshot=options.fewshot,
        limit=options.limit,
        runtime=options.runtime,
        harness=harness,
        artifact=model.fingerprint(),
        baseline=baseline.fingerprint() if baseline else None,
        qtool=__version__,
    )
    found = found.model_copy(update={"gates": judge_tasks(found, options.gates)})
    if place:
        update_tasks(place, found)
    if out:
        with new_file(out) as partial:
            partial.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return found


def scorer(model: Checkpoint, options: TaskOptions, listener: Listener, runtime: str) -> Scorer:
    """What runs a model. Raises UsageError: llama.cpp is to run something else than GGUF."""
    progress = tell(listener)
    if runtime == "llama.cpp":
        return llama_cpp(gguf_file(model), longest(model), progress)
    device = device_of(options.device)
    dtype = EXACT if options.dtype == "auto" else dtype_of(options.dtype, device)
    return streamed(model, device, dtype, progress)
