"""What checkpoints call the tensors of a model class, and which part of which parameter each of them is.

transformers renames tensors and stacks matrices when it loads a checkpoint, and undoes this when it saves one. Here it
undoes this on the meta device, where whatever is cut out of a parameter still has the parameter's storage.

Shape letters: X experts, R rows and C columns of an expert's matrix as it is stored in a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.derived.skeleton import quiet
from qtool.checkpoint.families._parts import Slice


class Still(Tensor):
    """A tensor that is not moved when something is cut out of it."""

    def contiguous(self, *_: Any, **__: Any) -> Tensor:
        """Stays where it is."""
        return self

    def clone(self, *_: Any, **__: Any) -> Tensor:
        """Stays where it is."""
        return self


@dataclass(frozen=True)
class Origin:
    """Where a tensor of a checkpoint is in the model class.

    Attributes:
        key: the parameter or buffer.
        shape: of the checkpoint's tensor.
        part: which part of it; None: all of it.
    """

    key: str
    shape: tuple[int, ...]
    part: Slice | None = None


def own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers that checkpoints store, each under one name where several modules share it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            owners.setdefault(id(parameter), name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name)
    own = {name for name, parameter in model.named_parameters(remove_duplicate=False) if owners[id(parameter)] == name}
    own |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in own}


def origins(model: Any) -> tuple[dict[str, Origin], list[str]]:
    """Tensor of a checkpoint -> where it is in the model class, and names of those that are put together of several.

    Args:
        model: on the meta device.
    """
    state: dict[str, Tensor] = {name: tensor.as_subclass(Still) for name, tensor in own_tensors(model).items()}
    storages = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
    found: dict[str, Origin] = {}
    lost = []
    for name, tensor in as_saved(model, state).items():
        key = storages.get(tensor.untyped_storage()._cdata)
        if key is None:
            lost.append(name)
            continue
        whole = state[key]
        same = tensor.shape == whole.shape and tensor.stride() == whole.stride()
        found[name] = Origin(key, tuple(tensor.shape), None if same else part_of(key, whole, tensor))
    return found, lost


def as_saved(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers would store of a model."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # releases that store what the class has
        return state
    with quiet(), torch.no_grad():
        return dict(revert_weight_conversion(model, state))


def part_of(key: str, whole: Tensor, tensor: Tensor) -> Slice:
    """Which part of a parameter [X, R, C] or [X, R] a matrix [N, K] or a vector [N] is.

    Args:
        key: the parameter's name.
        whole: the parameter.
        tensor: cut out of its storage.
    """
    if tensor.dim() == whole.dim() > 2 and tensor.is_contiguous() and tensor.shape[1:] == whole.shape[1:]:
        row = int(tensor.storage_offset() - whole.storage_offset()) // tensor[0].numel()
        return Slice(key, tuple(whole.shape), first=row)  # several kernels of convolutions in one
    if tensor.dim() == whole.dim() == 3 and tensor.shape == whole.mT.shape and tensor.stride(2) != 1:
        return Slice(key, tuple(whole.shape), transposed=True)
    stacked = tensor.dim() < whole.dim()
    inner = whole[0].numel() if stacked else whole.numel()
    index, first = divmod(int(tensor.storage_offset() - whole.storage_offset()), inner)
    columns = whole.shape[-1] if tensor.dim() == 2 else 1
    transposed = tensor.dim() == 2 and tensor.stride(0) < tensor.stride(1)
    step = tensor.stride(0) if transposed or tensor.dim() == 1 else tensor.stride(0) // columns
    row = first if transposed else first // columns
    return Slice(key, tuple(whole.shape), index if stacked else None, row, step, transposed)
