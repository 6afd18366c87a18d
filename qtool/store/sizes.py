"""How large the tensors of a neutral checkpoint are, known before a matrix is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qtool.checkpoint._base import Checkpoint, Layer, TensorInfo
from qtool.formats._base import entries
from qtool.store.inputs import op_tensors
from qtool.store.manifest import WEIGHT, residual_prefix
from qtool.store.tight import tight_info

Infos = dict[str, TensorInfo]


def block_infos(model: Checkpoint, layers: Mapping[str, Layer], names: Sequence[str]) -> Infos:
    """Shapes and types of the tensors of a block's file, in the order in which they are written.

    Args:
        model: that has them.
        layers: how modules are quantized.
        names: of the block's tensors in the model.
    """
    modules = {name.removesuffix(".weight"): name for name in names if name.removesuffix(".weight") in layers}
    found: Infos = {}
    for module, name in modules.items():
        n, k = model.info(name).shape
        found |= {f"{module}.{part}": info for part, info in matrix_infos(layers[module], n, k).items()}
    for module in modules:
        found |= {f"{module}.{part}": info for part, info in op_infos(layers[module]).items()}
    return found | {name: model.info(name) for name in names if name not in modules.values()}


def matrix_infos(layer: Layer, n: int, k: int) -> Infos:
    """Shapes and types of codes, parameters and corrections of a matrix, by their names below its module."""
    found = {f"{WEIGHT}codes": TensorInfo((n, (k * layer.format.code_bits + 7) // 8), torch.uint8)}
    for name, (count, dtype) in entries(layer.format, k).items():
        found[f"{WEIGHT}{name}"] = tight_info(layer.format, name, n, count, dtype)
    for i, residual in enumerate(layer.residuals):
        found |= {f"{residual_prefix(i)}{name}": TensorInfo(*info) for name, info in residual.infos(n, k).items()}
    return found


def op_infos(layer: Layer) -> Infos:
    """The same for what is done to the module's input."""
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in op_tensors(layer.input_ops).items()}
