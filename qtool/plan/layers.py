"""What was decided for every layer of a model, and what that comes to."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qtool import __version__
from qtool.checkpoint._base import Layer, Module
from qtool.formats._base import Format
from qtool.methods._base import Method
from qtool.ops._base import InputOp
from qtool.recipe.schema import Recipe
from qtool.residuals._base import Residual
from qtool.stats._base import Statistic
from qtool.stats.values import Values


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
        bits: size of the stored matrix, parameters and corrections included.
        residuals: what is kept beside the codes, in order.
        input_ops: what is done to its input before that is rounded, in order.
    """

    module: Module
    format: Format | None
    method: Method | None
    activations: Format | None
    keep: str
    fallback: str | None
    rule: int
    bits: int
    residuals: tuple[Residual, ...] = ()
    input_ops: tuple[InputOp, ...] = ()

    @property
    def weight_needs(self) -> frozenset[type[Statistic]]:
        """What has to be measured on its input to choose codes and corrections."""
        chosen = self.method.needs if self.method else frozenset()
        return chosen.union(*(residual.needs for residual in self.residuals))

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What has to be measured on its input: for its weight, and for a scale that holds for all tokens."""
        static = self.activations and self.activations.static
        return self.weight_needs | ({Values} if static else set())

    @property
    def layer(self) -> Layer | None:
        """As checkpoints describe it; None if kept."""
        if self.format is None:
            return None
        return Layer(self.format, self.activations, residuals=self.residuals, input_ops=self.input_ops)

    @property
    def label(self) -> str:
        """What becomes of it in a word or two: "int8-channel with int8-token inputs", "kept", "kept as f16"."""
        if self.layer is None:
            return "kept" if self.keep == "source" else f"kept as {self.keep}"
        return self.layer.label


@dataclass(frozen=True)
class Share:
    """All layers of one role that are treated alike.

    Attributes:
        role, label, fallback: as in the plan of each.
        method: its name; None: kept.
        layers: how many.
        weights, bits: of all of them together.
    """

    role: str
    label: str
    method: str | None
    fallback: str | None
    layers: int
    weights: int
    bits: int


@dataclass(frozen=True)
class Plan:
    """The whole run, decided.

    Attributes:
        recipe: as validated.
        layers: one entry per module, in the model's order, so block by block.
        artifacts: names of the artifacts to write, in recipe order.
        other_bytes: tensors that are no module (norms, biases), copied bit for bit.
        warnings: what the user should know and nobody has to fix.
        source_fingerprint: of the checkpoint.
        limited_blocks: blocks that a smoke run quantizes; None for a whole run.
        outside: names of tensors that no artifact holds; they are not counted.
    """

    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    artifacts: tuple[str, ...]
    other_bytes: int
    warnings: tuple[str, ...]
    source_fingerprint: str = ""
    limited_blocks: int | None = None
    outside: frozenset[str] = frozenset()

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all tensors when stored."""
        return sum(-(-p.bits // 8) for p in self.layers) + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Mean over all matrices, kept ones and parameters included."""
        return sum(p.bits for p in self.layers) / sum(math.prod(p.module.shape) for p in self.layers)

    def summary(self) -> tuple[Share, ...]:
        """The layers by role and treatment, in the model's order."""
        alike: dict[tuple[str, str, str | None, str | None], list[LayerPlan]] = {}
        for p in self.layers:
            method = p.method.name() if p.method else None
            alike.setdefault((p.module.role, p.label, method, p.fallback), []).append(p)
        return tuple(
            Share(*key, len(layers), sum(math.prod(p.module.shape) for p in layers), sum(p.bits for p in layers))
            for key, layers in alike.items()
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the codes: program version, model, calibration settings, layers.

        Names, artifacts and evaluation are left out: they only use the result. So is the content of a calibration
        file, which the recipe merely names.
        """
        layers = [
            [p.module.name, *map(_exact, (p.format, p.method, p.activations, *p.residuals)), p.keep]
            for p in self.layers
        ]
        calibration = self.recipe.calibration.model_dump(mode="json")
        transforms = [_exact(transform) for transform in self.recipe.transforms]
        content = [__version__, self.source_fingerprint, calibration, layers, _exact(self.recipe.kv_cache), transforms]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _exact(thing: BaseModel | None) -> Any:
    return thing and [type(thing).__name__, thing.model_dump(mode="json")]
