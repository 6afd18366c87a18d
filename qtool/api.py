"""qtool as a library: what the commands do, as functions that return what the commands print.

Nothing is printed: progress goes to a listener, which is called with a `qtool.pipeline.events.Event` for each step and
for each warning. Whatever goes wrong is a `qtool.QtoolError` of one line, with the command's exit code as `exit_code`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from qtool import models
from qtool.checkpoint._base import Checkpoint
from qtool.errors import QtoolError, UsageError  # noqa: F401 (offered)
from qtool.evaluate.gates import refuse_missed
from qtool.evaluate.result import Evaluation
from qtool.pipeline import calibrate as calibrating
from qtool.pipeline import evaluate as evaluating
from qtool.pipeline import export as exporting
from qtool.pipeline import quantize as quantizing
from qtool.pipeline.budget import divided
from qtool.pipeline.events import Listener, silent
from qtool.pipeline.matrix import quantize_matrix  # noqa: F401 (offered)
from qtool.pipeline.prepare import prepare
from qtool.plan import Plan
from qtool.recipe.load import load_recipe as _load_recipe
from qtool.recipe.schema import Recipe
from qtool.recipe.size import parse_size
from qtool.report.model import ArtifactEntry, Report

Model = str | Path | Checkpoint
"""A local folder, a hub id, a GGUF file, an artifact; or what `open_model` made of one."""
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bf16", "fp32"]


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        recipe: a path, the name of a recipe that ships, or the content of one as a mapping.
        overrides: `key=value` each, as in "calibration.samples=32".

    Raises:
        RecipeError: everything that is wrong with it, at once.
    """
    return _load_recipe(str(recipe) if isinstance(recipe, Path) else recipe, tuple(overrides))


def open_model(model: str | Path) -> Checkpoint:
    """Opens a checkpoint or a quantized artifact: names, shapes, and tensors one at a time. Only headers are read.

    Raises:
        CheckpointError: it is damaged, of an unknown kind, or cannot be found.
        HubError: the hub refused or cannot be reached.
    """
    return models.open_model(str(model))


def plan(
    model: Model,
    recipe: str | Path | Recipe,
    *,
    overrides: Iterable[str] = (),
    limit_layers: int | None = None,
    fit: int | str | None = None,
    bits: float | None = None,
    kld: float | None = None,
    scores: str | Path | None = None,
    listener: Listener = silent,
) -> Plan:
    """What a recipe would do to a model, layer by layer, with predicted sizes.

    No weight is read, unless the recipe has a budget, which is divided.

    Args:
        model: to what.
        recipe: path or name, or what `load_recipe` gave.
        overrides: see `load_recipe`.
        limit_layers: quantize only so many decoder blocks.
        fit: see `quantize`, as for the next three.
        bits: see there.
        kld: see there.
        scores: see there.
        listener: is told about progress of dividing a budget.

    Raises:
        RecipeError, CheckpointError, PlanError, UsageError: with every mismatch at once.
    """
    limit = _budget(fit, bits, kld)
    job = prepare(_source(model), _recipe(recipe), tuple(overrides), limit=limit_layers, budget=limit)
    if job.plan.recipe.budget:
        job, _ = divided(job, None if scores is None else Path(scores), listener)
    return job.plan


def calibrate(
    model: Model,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    overrides: Iterable[str] = (),
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: bool = False,
    listener: Listener = silent,
) -> calibrating.Measured:
    """Measures the inputs of a model's layers once, into a file that `quantize` takes as `stats`.

    Args:
        model: what to measure.
        recipe: of which only the calibration matters.
        out: file; an importance matrix of llama.cpp if its name ends in .gguf.
        overrides: see `load_recipe`.
        device: where to compute.
        dtype: in which type to run the model.
        overwrite: replace an earlier file.
        listener: called with events of progress and with warnings.
    """
    options = calibrating.CalibrateOptions(
        _source(model), _recipe(recipe), Path(out), tuple(overrides), device, dtype, overwrite=overwrite
    )
    return calibrating.run(options, listener)


def quantize(
    model: Model,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    overrides: Iterable[str] = (),
    limit_layers: int | None = None,
    stats: str | Path | None = None,
    imatrix: str | Path | None = None,
    fit: int | str | None = None,
    bits: float | None = None,
    kld: float | None = None,
    scores: str | Path | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: bool = False,
    verify: bool = True,
    listener: Listener = silent,
) -> Report:
    """Quantizes a model, writes the artifacts and a report; called again, it continues what was interrupted.

    Args:
        model: what to quantize.
        recipe: how; path or name, or what `load_recipe` gave.
        out: folder of the result, with `<out>.work` used on the way; or NAME.gguf, beside its folder NAME.report.
        overrides: see `load_recipe`.
        limit_layers: quantize only so many decoder blocks.
        stats: what `calibrate` measured.
        imatrix: an importance matrix of llama.cpp to round with.
        fit: for a recipe with a budget, bytes that the files with tensors may have at most, or "4.2GB".
        bits: the same per weight of the model.
        kld: divergence that is allowed; the file is as small as that allows.
        scores: file that keeps what a budget is divided by, or folder of such files.
        device: where to compute.
        dtype: in which type to run the model.
        overwrite: replace an earlier result.
        verify: read artifacts back and compare.
        listener: called with events of progress and with warnings.

    Raises:
        GateError: a gate of the recipe is missed; result and report are in `out` all the same. QtoolError: otherwise.
    """
    options = quantizing.QuantizeOptions(
        _source(model),
        _recipe(recipe),
        Path(out),
        overrides=tuple(overrides),
        limit=limit_layers,
        stats=None if stats is None else Path(stats),
        imatrix=None if imatrix is None else Path(imatrix),
        limit_of=_budget(fit, bits, kld),
        scores=None if scores is None else Path(scores),
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        verify=verify,
    )
    report = quantizing.run(options, listener)
    quantizing.conclude(report, options, listener)
    return report


def export(
    artifact: str | Path,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    listener: Listener = silent,
) -> ArtifactEntry:
    """Writes an artifact's codes in another layout: exactly, or not at all.

    Args:
        artifact: a quantized model.
        to: name of the layout, as in "gguf".
        out: folder of the result.
        overwrite: replace an earlier result.
        verify: read the result back and compare.
        listener: called with events of progress and with warnings.

    Raises:
        PlanError: the layout cannot hold these codes, with every reason.
        QtoolError: of other kinds.
    """
    return exporting.run(exporting.ExportOptions(str(artifact), to, Path(out), overwrite, verify), listener)


def evaluate(
    artifact: Model,
    text: str | Path,
    *,
    baseline: Model | None = None,
    context: int = 512,
    chunks: int | None = None,
    runtime: Literal["qtool", "llama.cpp"] = "qtool",
    gates: Mapping[str, float] | None = None,
    update: bool = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    listener: Listener = silent,
) -> Evaluation:
    """Perplexity of a model on a text, and its divergence from a baseline, by llama-perplexity's protocol.

    Args:
        artifact: the model under test.
        text: UTF-8 file.
        baseline: the unquantized model.
        context: tokens per chunk; the second half is scored.
        chunks: how many to score at most.
        runtime: what runs the artifact; llama.cpp reads GGUF only.
        gates: limits by name, as in {"kld": 0.05}.
        update: add the result to the artifact's report and model card.
        device: where to compute.
        dtype: in which type to run the models; "auto" is float32.
        listener: called with events of progress.

    Raises:
        GateError: a limit is missed.
        QtoolError: of other kinds.
    """
    options = evaluating.EvaluateOptions(
        _source(artifact),
        None if baseline is None else _source(baseline),
        Path(text),
        context,
        chunks,
        runtime,
        dict(gates or {}),
        device,
        dtype,
        update=update,
    )
    found = evaluating.run(options, listener)
    refuse_missed(found.gates)
    return found


def _source(model: Model) -> str | Checkpoint:
    return model if isinstance(model, Checkpoint) else str(model)


def _budget(fit: int | str | None, bits: float | None, kld: float | None) -> dict[str, object]:
    """The limit of a budget as stages take it. Raises UsageError: no size, or no positive number."""
    try:
        size = None if fit is None else parse_size(fit)
    except ValueError as error:
        raise UsageError(f"fit: {error}") from None
    for name, value in (("bits", bits), ("kld", kld)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(name, wanted="a positive number", found=value)
    return {"size": size, "bits": bits, "kld": kld}


def _recipe(recipe: str | Path | Recipe) -> str | Recipe:
    return str(recipe) if isinstance(recipe, Path) else recipe
