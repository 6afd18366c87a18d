"""What cannot be done to a model that is known by names and shapes of its tensors only."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.checkpoint._base import Checkpoint
from qtool.errors import PlanError
from qtool.plan import Plan

LAYOUTS = ("compressed-tensors", "fp8")
"""Layouts that are read back by such names."""


def refuse_class(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises PlanError: the recipe wants something that only a model class can do."""
    if checkpoint.family.model_free and (lines := list(wants(plan))):
        raise PlanError(lines, f"recipe {plan.recipe.name} does not fit --model-free")


def wants(plan: Plan) -> Iterator[str]:
    """What needs a model class, and what to do instead."""
    recipe = plan.recipe
    for name in sorted({p.method.name() for p in plan.layers if p.method and p.needs}):
        yield f"{name} measures inputs of layers, for which the model has to run: take a recipe without data"
    if any(p.activations and p.activations.static for p in plan.layers):
        yield "inputs with a scale for all tokens have to be measured: take a recipe that rounds them at run time"
    if recipe.eval:
        yield "eval: runs the model; remove it"
    if recipe.transforms or recipe.finish:
        yield "transforms: and finish: look at how layers follow each other; remove them"
    if recipe.kv_cache:
        yield "kv_cache: nobody knows the model's heads; remove it"
    if other := sorted(set(plan.artifacts) - set(LAYOUTS)):
        yield f"{', '.join(other)}: export to {' or '.join(LAYOUTS)} instead"
