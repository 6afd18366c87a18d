"""Measures a quantized model on a text."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.open import local
from qtool.errors import UsageError
from qtool.evaluate.gates import judge, validate_gates
from qtool.evaluate.result import Evaluation
from qtool.evaluate.run import Progress, evaluate
from qtool.models import open_model
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.content import refuse_changed
from qtool.pipeline.events import Event, Listener, silent
from qtool.pipeline.prepare import Job, device_of, dtype_of
from qtool.pipeline.update import result_of, update
from qtool.recipe.schema import Eval
from qtool.store.files import check_file, new_file
from qtool.store.names import output_path

EXACT = torch.float32
"""bfloat16 alone costs a divergence of 0.001 nats on the demo model, as much as good 8-bit weights do."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What `qtool eval` was asked to do.

    Attributes:
        artifact: the model under test: an artifact, or any checkpoint.
        baseline: the model to compare with; None: perplexity only.
        text, context, chunks, runtime: see `qtool.evaluate.run.evaluate`.
        gates: limits by name; the result says how it stands to them, and the caller refuses what misses one.
        device: "auto", "cpu" or "cuda".
        dtype: of forward passes; "auto" is float32.
        out: JSON file to write.
        update: add the result to the artifact's report and model card.
        ranks: who evaluates together; all are asked for the same.
    """

    artifact: str | Checkpoint
    baseline: str | Checkpoint | None
    text: Path
    context: int = 512
    chunks: int | None = None
    runtime: Literal["qtool", "llama.cpp"] = "qtool"
    gates: dict[str, float] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None
    update: bool = False
    ranks: Ranks = ALONE


def run(options: EvaluateOptions, listener: Listener = silent) -> Evaluation:
    """Opens the models, evaluates, writes the JSON file if one is wanted.

    Raises:
        QtoolError: of most kinds; see `qtool.evaluate.run.evaluate`.
    """
    validate_gates(options.gates, compared=options.baseline is not None)
    check_text(options.text)
    place = updated_place(options)
    out = options.out and output_path(options.out, options.artifact, options.baseline or options.artifact, options.text)
    ranks = options.ranks
    if out and ranks.first:
        check_file(out)
    device = device_of(options.device, ranks)
    model, baseline = opened(options.artifact), None if options.baseline is None else opened(options.baseline)
    for source in (model.source, *([baseline.source] if baseline else [])) if ranks.first else ():
        refuse_changed(source, listener)
    evaluation = evaluate(
        model,
        baseline,
        options.text,
        context=options.context,
        chunks=options.chunks,
        device=device,
        dtype=EXACT if options.dtype == "auto" else dtype_of(options.dtype, device),
        progress=tell(listener),
        runtime=options.runtime,
        ranks=ranks,
    )
    evaluation = evaluation.model_copy(update={"gates": judge(evaluation, options.gates)})
    if place and ranks.first:
        update(place, evaluation)
    if out and ranks.first:
        with new_file(out) as partial:
            partial.write_text(evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return ranks.broadcast(evaluation)


class Updating(Protocol):
    """What says whether a report is to be updated."""

    @property
    def artifact(self) -> str | Checkpoint:
        """The model under test."""

    @property
    def update(self) -> bool:
        """Whether its report is updated."""


def updated_place(options: Updating) -> Path | None:
    """Where the artifact lies whose report is to be updated; None if none is.

    Raises:
        UsageError: it has no report, or is no local one.
    """
    if not options.update:
        return None
    source = options.artifact.source if isinstance(options.artifact, Checkpoint) else options.artifact
    result_of(local(source))
    return local(source)


def opened(model: str | Checkpoint) -> Checkpoint:
    """A model; it may be open already."""
    return model if isinstance(model, Checkpoint) else open_model(model)


def check(asked: Eval | None) -> None:
    """Refuses an evaluation that cannot be done, before hours of work. Raises UsageError."""
    if asked:
        validate_gates(asked.gates, compared=True)
        check_text(Path(asked.text))


def as_asked(job: Job, model: Checkpoint, asked: Eval, listener: Listener) -> Evaluation:
    """The evaluation that a recipe asks for: of its result, against the source."""
    evaluation = evaluate(
        model,
        job.original,
        Path(asked.text),
        context=asked.context,
        chunks=asked.chunks,
        device=job.device,
        dtype=EXACT,
        progress=tell(listener),
        ranks=job.ranks,
        once=partial(job.shared.once, ("logits", asked.text, asked.context, asked.chunks)),
    )
    return evaluation.model_copy(update={"artifact": None, "gates": judge(evaluation, asked.gates)})


def check_text(text: Path) -> None:
    """Refuses a text that is not there. Raises UsageError."""
    if not os.path.isfile(text):
        raise UsageError("the evaluation text", wanted="a UTF-8 file", found=f"no file {text}")


def tell(listener: Listener) -> Progress:
    """A listener as `evaluate` wants one."""
    return lambda done, total, message: listener(Event("evaluate", done, total, message))
