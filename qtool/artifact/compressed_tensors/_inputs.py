"""Inputs that are rounded with one scale for all tokens: `input_scale` [1], and `input_zero_point` int8 [1]."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qtool.artifact._integers import exact
from qtool.artifact._packed import SCALE_DTYPES, Infos
from qtool.artifact.compressed_tensors._kinds import Read
from qtool.checkpoint._base import Layer, Static, TensorInfo
from qtool.errors import CheckpointError
from qtool.formats.int import Int

INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"


def infos(layer: Layer, dtype: torch.dtype) -> Infos:
    """Names below the module, shapes and types; the scale has the model's type."""
    if layer.activations is None or not layer.activations.static:
        return {}
    scale = {INPUT_SCALE: TensorInfo((1,), dtype)}
    return scale | ({INPUT_ZERO: TensorInfo((1,), torch.int8)} if _has_zero(layer) else {})


def encode(layer: Layer, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer's inputs. Raises PlanError: the scale is not exact in the model's type."""
    if not infos(layer, dtype):
        return {}
    assert layer.static is not None
    tensors = {INPUT_SCALE: exact(torch.tensor([layer.static.scale]), module, dtype)}
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
    for name, wanted in infos(layer, torch.bfloat16).items():
        if name not in found or found[name].shape not in ((), (1,)):
            raise CheckpointError(f"{module}.{name}", wanted="one number", found=found.get(name, "no such tensor"))
        if name == INPUT_ZERO and found[name].dtype != wanted.dtype:
            raise CheckpointError(f"{module}.{name}", wanted=wanted.dtype, found=found[name].dtype)
    if layer.activations is None or not layer.activations.static:
        return layer
    scale = float(read(INPUT_SCALE))
    if found[INPUT_SCALE].dtype not in SCALE_DTYPES or not 0 < scale < math.inf:
        raise CheckpointError(f"{module}.{INPUT_SCALE}", wanted="a positive float", found=scale)
    static = Static(scale, int(read(INPUT_ZERO)) if _has_zero(layer) else 0)
    inputs = layer.activations.model_copy(update={"scale_dtype": SCALE_DTYPES[found[INPUT_SCALE].dtype]})
    return replace(layer, activations=inputs, static=static)


def _has_zero(layer: Layer) -> bool:
    return isinstance(layer.activations, Int) and not layer.activations.symmetric
