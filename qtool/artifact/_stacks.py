"""Layouts that keep the matrices of all experts, which are tensors of their own everywhere else, in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from qtool.artifact._shards import Pieces, Read
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.raw_bytes import Stretch
from qtool.checkpoint.safetensors_header import TensorPlace
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError

Stacks = Mapping[str, Sequence[str]]
"""Name of a stack -> the modules whose tensors it holds, one behind the other."""


def join(pieces: Pieces, read: Read, stacks: Stacks) -> tuple[Pieces, Read]:
    """Puts what is to be written together, as `write_shards` takes it: tensors [...] of X modules become [X, ...].

    Args:
        pieces: of single modules, by the names of their weights.
        read: gives the tensors of one.
        stacks: what belongs together; the modules of a stack are packed alike.
    """
    stack_of = {member: stack for stack, members in stacks.items() for member in members}
    together: dict[str, Mapping[str, TensorInfo]] = {}
    for key, piece in pieces.items():
        module = key.removesuffix(".weight")
        if stack := stack_of.get(module):
            shapes = {name: TensorInfo((len(stacks[stack]), *i.shape), i.dtype) for name, i in piece.items()}
            together[f"{stack}.weight"] = {stack + name.removeprefix(module): info for name, info in shapes.items()}
        else:
            together[key] = piece

    def read_together(key: str) -> Mapping[str, Tensor | Stretch]:
        stack = key.removesuffix(".weight")
        if stack not in stacks:
            return read(key)
        parts = [[cast(Tensor, t) for t in read(f"{member}.weight").values()] for member in stacks[stack]]
        return {name: torch.stack(tensors) for name, *tensors in zip(together[key], *parts, strict=True)}

    return together, read_together


def split(located: dict[str, SafetensorsFile], stacks: Stacks, parts: Sequence[str]) -> None:
    """Lists the tensors of stacks as those of the modules that they hold.

    Args:
        located: tensor name -> file; changed.
        stacks: what belongs together.
        parts: names of a module's tensors.

    Raises:
        CheckpointError: a stack does not hold as many.
    """
    for stack, members in stacks.items():
        for part in parts:
            if file := located.pop(name := f"{stack}.{part}", None):
                whole = file.entries.pop(name)
                if whole.info.shape[:1] != (len(members),):
                    what = f"{file.path}: tensor {name}"
                    raise CheckpointError(what, wanted=f"{len(members)} matrices", found=list(whole.info.shape))
                one = TensorInfo(whole.info.shape[1:], whole.info.dtype)
                names = [f"{member}.{part}" for member in members]
                file.entries |= {n: TensorPlace(one, whole.offset + i * one.nbytes) for i, n in enumerate(names)}
                located |= dict.fromkeys(names, file)
