"""FP8 KV caches: `kv_cache_scheme` of config.json, and `k_scale` and `v_scale` below every attention module.

Scales are [1] for strategy `tensor`, and [heads of keys and values, 1, 1] for `attn_head`. The library itself knows
integers as well, vLLM does not.
"""

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
from qtool.formats.fp import FP
from qtool.recipe.cache import KVCache

SCHEME = "kv_cache_scheme"
SCALES = ("k_scale", "v_scale")
STRATEGIES: dict[str, Format] = {"tensor": STATIC_FP8, "attn_head": FP(element="e4m3", group="head")}


def strategy(fmt: KVCache) -> str | None:
    """What the layout calls it; None if it has no such thing."""
    if fmt.hadamard is not None:
        return None
    sides = (fmt.keys, fmt.values)
    return next((name for name, mine in STRATEGIES.items() if all(alike(side, mine) for side in sides)), None)


def carry(fmt: KVCache | None) -> Carry:
    """Whether a KV cache in a format, or an unrounded one, can be held."""
    if fmt is None or strategy(fmt):
        return Carry(True)
    wanted = " or ".join(mine.label for mine in STRATEGIES.values())
    return Carry(False, f"its runtimes read KV caches in {wanted}, not {fmt.label}; `to: qtool` carries every one")


def settings(model: QuantizedCheckpoint) -> dict[str, Any] | None:
    """What config.json says."""
    return spelled(8, "float", str(strategy(model.cache.format))) if model.cache else None


def tensors(model: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """The scales by name, in the model's type. Raises PlanError: one is not exact there."""
    if not isinstance(model, QuantizedCheckpoint) or model.cache is None:
        return {}
    shape = scale_shape(model, str(strategy(model.cache.format)))
    found = {}
    for block, sides in model.cache.statics.items():
        for name, statics in zip(names(model, block), sides, strict=True):
            found[name] = exact(torch.tensor([static.scale for static in statics]), name, dtype).view(shape)
    return found


def names(model: Checkpoint, block: int) -> tuple[str, ...]:
    """Of the two tensors of a decoder block."""
    prefix = model.family.block_prefix.format(i=block)
    linears = model.family.block_linears(model.config, block)
    attention = next(linear.path.rpartition(".")[0] for linear in linears if linear.role == "o")
    return tuple(f"{prefix}{attention}.{scale}" for scale in SCALES)


def scale_shape(model: Checkpoint, name: str) -> tuple[int, ...]:
    """Shape of one of them."""
    return (1,) if name == "tensor" else (model.family.heads(model.config)[1], 1, 1)


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
        arguments = Arguments.model_validate(scheme)
    except ValidationError as error:
        raise CheckpointError(f"{model.source}: wrong {SCHEME}", found=error.errors()[0]["msg"]) from error
    known = arguments.grouping in STRATEGIES
    if (arguments.num_bits, arguments.type, arguments.symmetric, arguments.dynamic) != (
        8,
        "float",
        True,
        False,
    ) or not known:
        raise CheckpointError(
            f"{model.source}: {SCHEME}", wanted="8-bit float per tensor or attn_head", found=arguments
        )
    fmt, shape, statics = STRATEGIES[arguments.grouping], scale_shape(model, arguments.grouping), {}
    for block in range(model.family.blocks(model.config)):
        keys, values = (_scales(tensor(name), shape, f"{model.source}: {name}") for name in names(model, block))
        statics[block] = keys, values
    return Cache(KVCache(keys=fmt, values=fmt), statics)


def _scales(tensor: Tensor | None, shape: tuple[int, ...], where: str) -> tuple[Static, ...]:
    """What a tensor holds; one number may have no dimension."""
    if tensor is not None and tensor.is_floating_point() and tensor.shape in (shape, () if shape == (1,) else shape):
        found = tensor.flatten().tolist()
        if all(0 < scale < math.inf for scale in found):
            return tuple(map(Static, found))
    wanted = "a positive float" if shape == (1,) else f"positive floats {list(shape)}"
    raise CheckpointError(where, wanted=wanted, found="no such tensor" if tensor is None else f"{tensor!r:.60}")
