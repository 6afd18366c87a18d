"""Inputs that are rounded with one scale for all tokens: `input_scale` [1], and `input_zero_point` int8 [1].

Where groups of columns have scales inside of that one, its reciprocal is kept: `input_global_scale` float32 [1].
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qtool.artifact._integers import exact
from qtool.artifact._packed import SCALE_DTYPES, Infos
from qtool.artifact.compressed_tensors._kinds import Read, multiplier
from qtool.checkpoint._base import Layer, Static, TensorInfo
from qtool.errors import CheckpointError
from qtool.formats.int import Int

INPUT_SCALE, INPUT_ZERO, INPUT_GLOBAL = "input_scale", "input_zero_point", "input_global_scale"


def infos(layer: Layer, dtype: torch.dtype) -> Infos:
    """Names below the module, shapes and types; the scale has the model's type."""
    if layer.activations is None or not layer.activations.static:
        return {}
    if layer.activations.group_columns:
        return {INPUT_GLOBAL: TensorInfo((1,), torch.float32)}
    scale = {INPUT_SCALE: TensorInfo((1,), dtype)}
    return scale | ({INPUT_ZERO: TensorInfo((1,), torch.int8)} if _has_zero(layer) else {})


def encode(layer: Layer, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer's inputs. Raises PlanError: the scale is not exact in the type that it is stored in."""
    parts = infos(layer, dtype)
    if not parts:
        return {}
    assert layer.static is not None
    scale = torch.tensor([layer.static.scale], dtype=torch.float64)
    if INPUT_GLOBAL in parts:
        return {INPUT_GLOBAL: multiplier(scale, module)}
    tensors = {INPUT_SCALE: exact(scale.float(), module, dtype)}
    return tensors | ({INPUT_ZERO: torch.tensor([layer.static.zero], dtype=torch.int8)} if _has_zero(layer) else {})


def decode(layer: Layer, found: Infos, read: Read, module: str) -> Layer:
    """A layer with the scale of its inputs, if it has one.

    Args:
        layer: its formats.
        found: the tensors that there are below the module.
        read: reads one of them.
        module: its name, for messages.

    Raises:
        CheckpointError: it is missing or impossible.
    """
    parts = infos(layer, torch.bfloat16)
    for name, wanted in parts.items():
        if name not in found or found[name].shape not in ((), (1,)):
            raise CheckpointError(f"{module}.{name}", wanted="one number", found=found.get(name, "no such tensor"))
        if name != INPUT_SCALE and found[name].dtype != wanted.dtype:
            raise CheckpointError(f"{module}.{name}", wanted=wanted.dtype, found=found[name].dtype)
    if layer.activations is None or not parts:
        return layer
    name = INPUT_GLOBAL if INPUT_GLOBAL in parts else INPUT_SCALE
    number = float(read(name))
    if found[name].dtype not in SCALE_DTYPES or not 0 < number < math.inf:
        raise CheckpointError(f"{module}.{name}", wanted="a positive float", found=number)
    if name == INPUT_GLOBAL:
        return replace(layer, static=Static(1.0 / number))
    static = Static(number, int(read(INPUT_ZERO)) if _has_zero(layer) else 0)
    inputs = layer.activations.model_copy(update={"scale_dtype": SCALE_DTYPES[found[INPUT_SCALE].dtype]})
    return replace(layer, activations=inputs, static=static)


def _has_zero(layer: Layer) -> bool:
    return isinstance(layer.activations, Int) and not layer.activations.symmetric
