"""What every run begins with: the model opened, the recipe read, the plan made; nothing of the weights is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.artifact.gguf.tensor_types import with_tensor_types
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.edits import STREAM, Edit
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import UsageError
from qtool.models import fit, open_model, open_whole
from qtool.numerics.threads.processor import compute_dtype
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.model_free import refuse_class, refuse_derived, wants_text_alone
from qtool.pipeline.requantize import second_generation, try_taken_over
from qtool.pipeline.shared import Shared
from qtool.pipeline.trained import trained_lines
from qtool.plan import Plan, make_plan
from qtool.recipe.export import options_of, owners
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Recipe

LIMITS = {"size": "--fit", "bits": "--bits", "kld": "--kld"}
"""What a budget may limit, and the flag that does."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """A model, what to do with it, what to write it as, and where and in which type to run it.

    Attributes:
        original: the model as it was given.
        checkpoint: what is quantized: the same, or what transforms make of it.
        ranks: who does it together.
        shared: what other runs for the model have found out.
    """

    original: Checkpoint
    checkpoint: Checkpoint
    plan: Plan
    artifacts: dict[str, Artifact]
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = ALONE
    shared: Shared = field(default_factory=Shared, compare=False)


def prepare(
    model: str | Checkpoint,
    recipe: str | Recipe,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    options: Mapping[str, object] | None = None,
    ranks: Ranks = ALONE,
    budget: Mapping[str, object] | None = None,
    tensor_types: Sequence[str] = (),
) -> Job:
    """Opens a model and plans a recipe for it.

    Args:
        model: folder, hub id or GGUF file; a quantized one as well; or an open one.
        recipe: path or name, or a checked one.
        overrides: `key=value` for fields of the recipe.
        seed: replaces the calibration's seed.
        limit: quantize this many decoder blocks and nothing else.
        device: "auto", "cpu" or "cuda".
        dtype: of forward passes: "auto", "bf16" or "fp32".
        options: of the artifacts that the recipe exports, by name; None as a value leaves what the recipe says.
        ranks: who prepares the same.
        budget: limit of the recipe's budget, "size", "bits" or "kld"; None as a value: not given.
        tensor_types: PATTERN=TYPE each, see `qtool.artifact.gguf.tensor_types`.

    Raises:
        RecipeError, CheckpointError, PlanError, UsageError: see `load_recipe`, `open_model`, `make_plan`.
    """
    place = device_of(device, ranks)
    if seed is not None:
        overrides = (*overrides, f"calibration.seed={seed}")
    if isinstance(recipe, Recipe) and overrides:
        parsed = load_recipe(recipe.model_dump(mode="json", exclude_none=True), overrides)
    else:
        parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    parsed = with_limit(parsed, {key: value for key, value in (budget or {}).items() if value is not None})
    parsed = with_options(parsed, {key: value for key, value in (options or {}).items() if value is not None})
    checkpoint = model if isinstance(model, Checkpoint) else open_model(model)
    exports = [export.to for export in parsed.export]
    checkpoint = fit(checkpoint, exports)
    if exports and not wants_text_alone(parsed):
        checkpoint = open_whole(checkpoint, exports)
    parsed = with_tensor_types(parsed, checkpoint, tensor_types)
    artifacts = {export.to: registry.load("artifact", export.to)(**export.options) for export in parsed.export}
    original, checkpoint = checkpoint, preview(checkpoint, parsed)
    plan = replace(make_plan(parsed, checkpoint, artifacts, limit), source_fingerprint=original.fingerprint())
    refuse_class(plan, original)
    refuse_derived(plan, original)
    try_taken_over(plan, original, artifacts.values())
    layers = {p.module.name: p.layer for p in plan.layers if p.layer}
    caveats = [f"{name}: {text}" for name, a in artifacts.items() for text in a.caveats(checkpoint, layers)]
    again = second_generation(plan, original)
    if again and parsed.transforms:
        again = ["the model is quantized already: transforms rewrite it, so all of it is decoded and rounded again"]
    trained = trained_lines(plan, original, ranks)
    plan = replace(plan, warnings=(*checkpoint.notes, *plan.warnings, *again, *trained, *caveats))
    return Job(original, checkpoint, plan, artifacts, place, dtype_of(dtype, place), ranks)


def preview(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """A model with the tensors that it has behind a recipe's transforms, whatever their values.

    Turning hidden states gives a tied output layer a matrix of its own.
    """
    turns = any(STREAM in transform.kinds for transform in recipe.transforms)
    if not turns or not checkpoint.tied:
        return checkpoint
    edges = checkpoint.family.edges(checkpoint.config, None)
    return Rewritten(checkpoint, [Edit(edge.name) for edge in edges if edge.kind == "norm"])


def with_limit(recipe: Recipe, chosen: Mapping[str, object]) -> Recipe:
    """The recipe with another limit of its budget. Raises UsageError: it has none, or this is no single one above 0."""
    if not chosen:
        return recipe
    names = ", ".join(LIMITS[key] for key in chosen)
    if len(chosen) > 1:
        raise UsageError(f"{names} exclude each other")
    if recipe.budget is None:
        raise UsageError(names, wanted="a recipe with a budget: such as gguf-fit", found=recipe.name)
    (limit,) = chosen.values()
    if isinstance(limit, float) and not 0 < limit < math.inf:
        raise UsageError(names, wanted="a positive number", found=f"{limit:g}")
    limits = dict.fromkeys((*LIMITS, "like")) | dict(chosen)
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update=limits)})


def with_options(recipe: Recipe, chosen: Mapping[str, object]) -> Recipe:
    """The recipe with these options in the exports that have them. Raises UsageError: none has one of them."""
    exports, used = [], set[str]()
    for export in recipe.export:
        own = {key: value for key, value in chosen.items() if key in options_of(export.to).model_fields}
        exports.append(export.model_copy(update=own))
        used |= own.keys()
    if idle := [key for key in chosen if key not in used]:
        names = " or ".join(dict.fromkeys(name for key in idle for name in owners(key)))
        wanted, found = f"a recipe that exports {names}", ", ".join(e.to for e in recipe.export) or "no export"
        raise UsageError(flags(idle), wanted=wanted, found=found)
    return recipe.model_copy(update={"export": tuple(exports)})


def flags(options: Iterable[str]) -> str:
    """What options of artifacts are called on the command line."""
    return ", ".join(f"--{key.replace('_', '-')}" for key in options)


def device_of(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means. Raises UsageError: some process has no CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda", wanted="a CUDA device that torch sees", found="none", hint="use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if len(set(ranks.gather(name))) > 1:
        wanted = f"a CUDA device for each of {ranks.size} processes"
        raise UsageError("--device auto", wanted=wanted, found="fewer", hint="start fewer, or use --device cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type of forward passes that "auto", "bf16" or "fp32" means on a device."""
    return compute_dtype(device) if name == "auto" else DTYPES[name]
