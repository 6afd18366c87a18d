"""What cannot be done to a model without a family file: one that is derived, or known by names of its tensors only."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.derived.family import Derived
from qtool.checkpoint.edits import STREAM
from qtool.checkpoint.modules import beside
from qtool.errors import PlanError
from qtool.plan import Plan
from qtool.recipe.schema import Recipe
from qtool.stages.distill import Distill

LAYOUTS = ("compressed-tensors", "fp8")
"""Layouts that are read back by such names."""


def refuse_class(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises PlanError: the recipe wants something that only a model class can do."""
    if checkpoint.family.model_free and (lines := list(wants(plan))):
        raise PlanError(lines, f"recipe {plan.recipe.name} does not fit --model-free")


def refuse_derived(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises PlanError: the recipe wants something of a derived model that only a family file tells."""
    family = checkpoint.family
    if family.derived and not family.model_free and (lines := list(wants_file(plan, checkpoint))):
        raise PlanError(lines, f"recipe {plan.recipe.name} does not fit {checkpoint.config['model_type']} models")


def wants_text_alone(recipe: Recipe) -> bool:
    """Whether a recipe wants something of a text model that it cannot have of one with other parts."""
    distills = any(isinstance(stage, Distill) for stage in recipe.finish)
    return bool(recipe.calibration.token_weights or recipe.budget or distills or recipe.transforms)


def wants_file(plan: Plan, checkpoint: Checkpoint) -> Iterator[str]:
    """What needs a family file, and what to do instead."""
    recipe, why = plan.recipe, "the loss's gradients begin at the output layer, which only family files tell apart"
    if recipe.calibration.token_weights:
        yield f"token_weights: {why}; remove it"
    if recipe.budget:
        yield f"budget: {why}; choose formats by rules"
    if any(isinstance(stage, Distill) for stage in recipe.finish):
        yield f"finish: distill: {why}; remove it"
    turning = [transform.name() for transform in recipe.transforms if STREAM in transform.kinds]
    if turning and (stranger := first_stranger(checkpoint)):
        yield f"{turning[0]} turns hidden states, but not for {stranger}, which is beside the text model; remove it"
    if recipe.kv_cache and (other := uncached(checkpoint)) is not None:
        yield f"kv_cache: block {other} keeps something else than keys and values of whole heads; remove it"


def first_stranger(checkpoint: Checkpoint) -> str | None:
    """The first linear layer that no text goes through, such as a projector's or a draft layer's; None: there is none.

    It may write hidden states, or read them, which nothing of the text model tells.
    """
    family = checkpoint.family
    around = family.facts.around if isinstance(family, Derived) else {}
    return next((module.name for module in beside(checkpoint) if f"{module.name}.weight" not in around), None)


def uncached(checkpoint: Checkpoint) -> int | None:
    """The first block whose attention is not made of keys and values by matrices of their own; None: none is."""
    family, config = checkpoint.family, checkpoint.config
    heads, kv_heads, dim = family.heads(config)
    wanted = {"k": kv_heads * dim, "v": kv_heads * dim, "qkv": (heads + 2 * kv_heads) * dim}
    for i in range(family.blocks(config)):
        shapes = family.block_shapes(config, i)
        layers = [x for x in family.block_linears(config, i) if not x.path.endswith("in_proj_qkv")]  # of states
        rows = {x.role: shapes[f"{x.path}.weight"][0] for x in layers if x.role in wanted}
        if any(rows[role] != wanted[role] for role in rows) or not ({"k", "v"} <= rows.keys() or "qkv" in rows):
            return i
    return None


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
