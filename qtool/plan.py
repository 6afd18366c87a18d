"""recipe x checkpoint -> what will be done to every layer, checked and counted before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.checkpoint._base import Checkpoint, Layer, Module
from qtool.formats._base import Format
from qtool.methods._base import Method
from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one module.

    Attributes:
        module: which one.
        format: representation of its weight; None: kept.
        method: how codes are chosen; None: kept.
        activations: representation of its input at run time; None: left alone.
        keep: "source", or the dtype a kept tensor is cast to: "f32", "f16", "bf16".
        fallback: why `format` is not the one that the rule named; None if it is.
        rule: index into `recipe.layers` of the rule that decided, -1 for the default (embeddings nobody named).
        bits: size of the stored matrix, parameters included.
    """

    module: Module
    format: Format | None
    method: Method | None
    activations: Format | None
    keep: str
    fallback: str | None
    rule: int
    bits: int

    @property
    def layer(self) -> Layer | None:
        """As checkpoints describe it; None if kept."""
        return Layer(self.format, self.activations) if self.format else None


@dataclass(frozen=True)
class Plan:
    """The whole run, decided.

    Attributes:
        recipe: as validated.
        layers: one entry per module, in the model's order, so block by block.
        artifacts: names of the artifacts to write, in recipe order.
        other_bytes: tensors that are no module (norms, biases), copied bit for bit.
        warnings: what the user should know and nobody has to fix.
    """

    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    artifacts: tuple[str, ...]
    other_bytes: int
    warnings: tuple[str, ...]


def make_plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """Decides every layer.

    Raises:
        PlanError: every mismatch of recipe, model and artifacts, all at once.
    """
    raise NotImplementedError
