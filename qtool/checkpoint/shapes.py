"""Shapes of the weights that a folder holds, those of packed matrices among them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtool.checkpoint.derived.free import PARTS
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError


def stored_shapes(stored: Mapping[str, SafetensorsFile]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, those of packed matrices among them under the names of their weights."""
    shapes = {}
    for name, file in stored.items():
        module, _, part = name.rpartition(".")
        if part in PARTS and (f"{module}.weight" in stored or f"{module}.weight_packed" in stored):
            continue
        shape = file.info(name).shape
        if part == "weight_packed":
            name, shape = f"{module}.weight", _unpacked(stored, module)
        shapes[name] = shape
    return shapes


def _unpacked(stored: Mapping[str, SafetensorsFile], module: str) -> tuple[int, ...]:
    """Shape of a matrix that is packed: stored beside it, or seen from scales of groups. Raises CheckpointError."""
    if told := stored.get(f"{module}.weight_shape"):
        return tuple(told.read(f"{module}.weight_shape").tolist())
    if not (file := stored.get(name := f"{module}.weight_scale")):
        raise CheckpointError(f"{stored[f'{module}.weight_packed'].path} lacks {name}")
    scales = file.info(name)
    width = 16 if scales.dtype == torch.float8_e4m3fn else 32
    return (*scales.shape[:-1], scales.shape[-1] * width) if scales.shape else ()
