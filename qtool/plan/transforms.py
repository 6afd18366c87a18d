"""What a recipe's transforms mean for a plan: where they cannot work, and what stays in front of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.edits import STREAM, model_edges, takes_shifts
from qtool.plan.findings import Findings
from qtool.plan.layers import LayerPlan
from qtool.recipe.schema import Recipe
from qtool.transforms._base import Kind, Transform


def operate(
    layers: Sequence[LayerPlan], recipe: Recipe, checkpoint: Checkpoint, findings: Findings
) -> tuple[LayerPlan, ...]:
    """The layers with what is done to their inputs.

    Args:
        layers: what was decided.
        recipe: has the transforms.
        checkpoint: the model; only names and shapes are looked at.
        findings: gets what is wrong with the transforms.
    """
    found = tuple(replace(p, input_ops=checkpoint.input_ops.get(p.module.name, ())) for p in layers)
    for p in found:
        if p.input_ops and p.format is None:
            text = f"its weight is made for inputs behind {p.input_ops[0].label}: only a quantized layer can say so"
            findings.add(p.rule, text, p.module.name)
    if checkpoint.input_ops and any("input" not in transform.kinds for transform in recipe.transforms):
        findings.add(-1, "transforms: the model has operations on inputs already: nothing can be folded into it")
    staying = ""
    for transform in recipe.transforms:
        for text in _misfits(transform, found, checkpoint):
            findings.add(-1, f"transforms: {transform.name()}: {text}")
        if staying and "input" not in transform.kinds:
            findings.add(-1, f"transforms: {transform.name()} has to come before {staying}, which stays in the model")
        staying = transform.name() if "input" in transform.kinds else staying
        found = tuple(_behind(p, transform) for p in found)
    return found


def _behind(p: LayerPlan, transform: Transform) -> LayerPlan:
    """A layer with what a transform leaves in front of it."""
    width = p.module.shape[1]
    if p.format is None or p.module.kind == "embedding" or transform.misfit("input", width, width):
        return p
    op = transform.stays(width)
    return replace(p, input_ops=(*p.input_ops, op)) if op else p


def _misfits(transform: Transform, layers: Sequence[LayerPlan], checkpoint: Checkpoint) -> Iterator[str]:
    """Why a transform cannot work on the model, or on some of the places that it is meant for."""
    edges = [edge for edge in model_edges(checkpoint).values() if edge.kind in transform.kinds]
    kind = checkpoint.config["model_type"]
    if transform.adds and edges and not any(takes_shifts(checkpoint, edge) for edge in edges):
        yield f"no norm and no values of {kind} models have biases, and layers that read them, for what it adds"
    if STREAM in transform.kinds and all(edge.kind != STREAM for edge in edges):
        yield f"hidden states of {kind} models cannot be turned, because norms write them"
    elif transform.kinds and not edges and "input" not in transform.kinds:
        yield f"{kind} models have none of the places that it works on ({', '.join(sorted(transform.kinds))})"
    sites: list[tuple[Kind, int, int]] = [(edge.kind, edge.width, edge.dim) for edge in edges]
    if "input" in transform.kinds:
        widths = [p.module.shape[1] for p in layers if p.format and p.module.kind != "embedding"]
        sites += [("input", width, width) for width in widths]
    yield from dict.fromkeys(filter(None, (transform.misfit(*site) for site in sites)))
