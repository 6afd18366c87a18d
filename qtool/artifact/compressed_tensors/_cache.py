"""FP8 KV caches: `kv_cache_scheme` of config.json, and `k_scale` and `v_scale` [1] below every attention module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from qtool.artifact._base import Carry
from qtool.artifact._integers import exact
from qtool.artifact.compressed_tensors._kinds import STATIC_FP8, Arguments, spelled
from qtool.checkpoint._base import Cache, Checkpoint, QuantizedCheckpoint, Static
from qtool.errors import CheckpointError
from qtool.formats._base import Format, alike

SCHEME = "kv_cache_scheme"
SCALES = ("k_scale", "v_scale")


def carry(fmt: Format | None) -> Carry:
    """Whether a KV cache in a format, or an unrounded one, can be held."""
    possible = fmt is None or alike(fmt, STATIC_FP8)
    wanted = f"its KV caches are {STATIC_FP8.label}, not {fmt.label if fmt else ''}"
    return Carry(possible, "" if possible else wanted)


def settings(model: QuantizedCheckpoint) -> dict[str, Any] | None:
    """What config.json says."""
    return spelled(8, "float", "tensor") if model.cache else None


def tensors(model: QuantizedCheckpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """The scales by name, in the model's type. Raises PlanError: one is not exact there."""
    if model.cache is None:
        return {}
    found = {}
    for block, statics in model.cache.statics.items():
        for name, static in zip(names(model, block), statics, strict=True):
            found[name] = exact(torch.tensor([static.scale]), name, dtype)
    return found


def names(model: Checkpoint, block: int) -> tuple[str, ...]:
    """Of the two scales of a decoder block."""
    prefix = model.family.block_prefix.format(i=block)
    linears = model.family.block_linears(model.config, block)
    attention = next(linear.path.rpartition(".")[0] for linear in linears if linear.role == "o")
    return tuple(f"{prefix}{attention}.{scale}" for scale in SCALES)


def read(model: Checkpoint, how: Mapping[str, Any], tensor: Callable[[str], Tensor | None]) -> Cache | None:
    """How the KV cache is rounded.

    Args:
        model: whose family and configuration are known.
        how: content of `quantization_config`.
        tensor: gives a stored tensor, or None.

    Raises:
        CheckpointError: a scheme that qtool does not read, or scales that are missing or impossible.
    """
    if not (scheme := how.get(SCHEME)):
        return None
    try:
        told = Arguments.model_validate(scheme)
    except ValidationError as error:
        raise CheckpointError(f"{model.source}: wrong {SCHEME}", found=error.errors()[0]["msg"]) from error
    if (told.num_bits, told.type, told.grouping, told.symmetric, told.dynamic) != (8, "float", "tensor", True, False):
        raise CheckpointError(f"{model.source}: {SCHEME}", wanted="8-bit float per tensor", found=told)
    statics = {}
    for block in range(model.family.blocks(model.config)):
        keys, values = (_scale(tensor(name), f"{model.source}: {name}") for name in names(model, block))
        statics[block] = keys, values
    return Cache(STATIC_FP8, statics)


def _scale(tensor: Tensor | None, where: str) -> Static:
    found = None if tensor is None or tensor.numel() != 1 or not tensor.is_floating_point() else float(tensor)
    if found is None or not 0 < found < math.inf:
        raise CheckpointError(where, wanted="a positive float", found="no such tensor" if tensor is None else found)
    return Static(found)
