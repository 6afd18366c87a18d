"""The groups of a `quantization_config`, read: which layout and formats each module has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from qtool.artifact._settings import Settings
from qtool.artifact._targets import target_pattern
from qtool.artifact.compressed_tensors._config import KINDS, input_format
from qtool.artifact.compressed_tensors._kinds import Arguments, Compressor
from qtool.checkpoint._base import Layer
from qtool.errors import CheckpointError, one_line

UNREAD = ("sparsity_config",)
"""What changes a model in ways that qtool does not follow."""


class ConfigGroup(Settings):
    """One entry of `config_groups`."""

    targets: list[str]
    format: str | None = None
    weights: Arguments
    input_activations: Arguments | None = None
    output_activations: dict[str, Any] | None = None


class Scheme(NamedTuple):
    """How a module is stored.

    Attributes:
        kind: its layout.
        layer: its formats; without what static inputs are rounded with.
        reason: what else is to be known of its inputs, that no other layout is given; empty if nothing.
    """

    kind: Compressor
    layer: Layer
    reason: str


class Schemes:
    """All groups.

    Args:
        config: content of `quantization_config`.
        where: the folder, for messages.

    Raises:
        CheckpointError: it says something that qtool does not understand, or cannot do.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        for key in UNREAD:
            if config.get(key):
                raise CheckpointError(f"{where}: qtool does not read models with a {key}")
        try:
            groups = dict(config.get("config_groups") or {})
            read = [ConfigGroup.model_validate(group) for group in groups.values()]
            self._targets = [(target_pattern(target), group) for group in read for target in group.targets]
        except (ValidationError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(f"{where}: wrong config_groups", found=one_line(error)) from error
        self.format = config.get("format")

    def find(self, module: str, scale_dtype: str) -> Scheme:
        """How a module is stored; exact targets win over the class.

        Args:
            module: its name.
            scale_dtype: type of its stored scales, as formats spell it.

        Raises:
            CheckpointError: no group, or one that qtool does not read.
        """
        named = [group for pattern, group in self._targets if pattern and pattern.match(module)]
        found = named + [group for pattern, group in self._targets if pattern is None]
        if not found:
            raise CheckpointError(f"{self.where}: no group of config_groups has {module} as target")
        group, arguments = found[0], found[0].weights
        kind = KINDS.get(group.format or str(self.format))
        try:
            fmt = kind.format(arguments, scale_dtype) if kind else None
        except ValidationError as error:
            what = f"{self.where}: {module}: {error.errors()[0]['msg']}"
            raise CheckpointError(what, found=f"{error.errors()[0]['input']!r:.40}") from error
        if kind is None or fmt is None or arguments.dynamic or group.output_activations:
            found_text = f"{group.format or self.format}, {arguments}"
            raise CheckpointError(f"{self.where}: {module}", wanted=f"one of {', '.join(KINDS)}", found=found_text)
        inputs = group.input_activations
        if inputs is None:
            return Scheme(kind, Layer(fmt), "")
        activations = input_format(inputs)
        if activations is None and inputs.dynamic is not True:
            return Scheme(kind, Layer(fmt), "its inputs have calibrated scales that qtool does not read")
        if activations is None:
            wanted = "inputs that qtool knows, scaled at run time"
            raise CheckpointError(f"{self.where}: {module}", wanted=wanted, found=inputs)
        return Scheme(kind, Layer(fmt, activations), "")
