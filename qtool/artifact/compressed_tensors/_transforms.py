"""`transform_config` of config.json: Hadamard matrices that a runtime multiplies inputs with.

    {"config_groups": {NAME: {"type": "hadamard", "head_dim": 32, "apply": [{"targets": [...], "location": "input"}]}}}

Entries for weights say what was done to them before they were stored, so that there is nothing left to do.
Source: https://github.com/vllm-project/compressed-tensors, src/compressed_tensors/transform
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from qtool.artifact._settings import Settings
from qtool.artifact._targets import patterns, target_pattern
from qtool.checkpoint._base import Module, QuantizedCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError, one_line
from qtool.ops._base import InputOp
from qtool.ops.hadamard import Hadamard

KEY = "transform_config"


class Place(Settings):
    """Where a matrix is."""

    targets: list[str]
    location: Literal["input", "weight_input", "weight_output", "output", "k_cache", "q_attn"]
    ignore: list[str] = Field(default_factory=list)


class TransformScheme(Settings):
    """A matrix and its places."""

    type: str
    apply: list[Place] = Field(default_factory=list)
    randomize: bool = False
    head_dim: int | None = None


def carries(module: Module, op: InputOp) -> bool:
    """Whether runtimes do it: Sylvester's Hadamard matrix without signs, in front of layers that are no experts."""
    plain = isinstance(op, Hadamard) and op.block & (op.block - 1) == 0 and bool((op.signs == 1).all())
    return plain and module.expert is None


def settings(model: QuantizedCheckpoint) -> dict[str, Any]:
    """What config.json says of a model's inputs: a mapping with one entry, or with none."""
    members: dict[int, list[str]] = defaultdict(list)
    for module, ops in model.input_ops.items():
        for op in ops:
            assert isinstance(op, Hadamard)
            members[op.block].append(module)
    groups = {}
    for block, names in members.items():
        targets = [f"re:{target}" for target in patterns(names, model)]
        place = {"targets": targets, "location": "input", "inverse": False, "ignore": []}
        groups[f"hadamard_{block}"] = {"type": "hadamard", "head_dim": block, "apply": [place]}
    return {KEY: {"config_groups": groups}} if groups else {}


class Transforms:
    """The groups of a `transform_config`, read.

    Args:
        config: content of `quantization_config`.
        where: the file, for messages.

    Raises:
        CheckpointError: it says something that qtool does not understand, or cannot do.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._places: list[tuple[TransformScheme, Place]] = []
        try:
            declared = dict((config.get(KEY) or {}).get("config_groups") or {})
            groups = [TransformScheme.model_validate(group) for group in declared.values()]
        except (ValidationError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: wrong {KEY}", found=one_line(error)) from error
        for group in groups:
            for place in group.apply:
                if place.location in ("weight_input", "weight_output"):
                    continue
                if place.location != "input" or group.type != "hadamard" or group.randomize:
                    found = f"{group.type}{' with randomize' * group.randomize} at {place.location}"
                    raise CheckpointError(f"{where}: {KEY}", wanted="hadamard at input", found=found)
                self._places.append((group, place))

    def check(self, model: QuantizedCheckpoint) -> None:
        """Raises CheckpointError: something is to be done to the input of a layer that is not quantized."""
        for module in modules(model):
            if (
                module.kind != "embedding"
                and module.name not in model.layers
                and self.ops(module.name, module.shape[1])
            ):
                raise CheckpointError(f"{self.where}: {KEY}", wanted="quantized layers", found=module.name)

    def ops(self, module: str, k: int) -> tuple[InputOp, ...]:
        """What is done to the input of a module with k columns.

        Raises:
            CheckpointError: no such matrix, or several.
        """
        found: list[InputOp] = []
        for group, place in self._places:
            if _hits(place.targets, module) and not _hits(place.ignore, module):
                try:
                    found.append(Hadamard(group.head_dim or k, torch.ones(k, dtype=torch.int8)))
                except ValueError as error:
                    raise CheckpointError(f"{self.where}: {KEY}: {module}: {error}") from error
        if len(found) > 1:
            raise CheckpointError(f"{self.where}: {KEY}", wanted=f"one for {module}", found=len(found))
        return tuple(found)


def _hits(targets: Sequence[str], module: str) -> bool:
    """Whether a list of names, expressions and the class of all linear layers has a module."""
    found = (target_pattern(target) for target in targets)
    return any(pattern is None or pattern.match(module) for pattern in found)
