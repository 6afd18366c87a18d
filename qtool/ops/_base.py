"""What can be done to the input of a linear layer, and how its weight makes up for it.

`layer(x) = x W^T + b` is also `op.apply(x) op.fold(W)^T + (b + op.bias(W))`. An operation is either folded into
whatever writes the input, so that nothing of it is left at run time, or stays in front of the layer, where a runtime
has to do it. One file per operation; its name is the file's.

Shape letters: C channels, N rows of a weight, M runs of channels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.errors import CheckpointError


class InputOp(ABC):
    """An operation on all channels of an input. Subclasses are dataclasses of tensors and plain numbers.

    Attributes:
        orthogonal: whether it keeps the lengths of vectors.
        adds: whether it adds something, so that layers need a bias to make up for it.
    """

    orthogonal: ClassVar[bool] = False
    adds: ClassVar[bool] = False

    @classmethod
    def name(cls) -> str:
        """The file's name."""
        return cls.__module__.rpartition(".")[2]

    @property
    def label(self) -> str:
        """What plans and reports call it."""
        return self.name()

    @property
    @abstractmethod
    def width(self) -> int:
        """C."""

    @property
    def run(self) -> int:
        """Channels of a run that it keeps apart from the others; 1: each channel by itself."""
        return 1

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """What the layer reads instead of x: float [..., C] -> same shape and type."""

    def mix(self, x: Tensor) -> Tensor:
        """`apply` without what it adds: what it does to each row of a matrix whose columns are outputs, [..., C]."""
        return self.apply(x)

    @abstractmethod
    def fold(self, w: Tensor) -> Tensor:
        """The weight that makes up for it: float [N, C] -> same shape and type."""

    def bias(self, w: Tensor) -> Tensor:
        """What has to be added to the bias of a layer with weight w, [N, C], before it is folded: [N]."""
        return w.new_zeros(len(w))

    @abstractmethod
    def spread(self, repeat: int, dim: int) -> InputOp:
        """The same for an input in which each run of `dim` channels stands `repeat` times in a row."""

    def data(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain fields, tensors) by name, from which `load` makes it again."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return {name: value for name, value in values.items() if name not in tensors}, tensors

    @classmethod
    def load(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> InputOp:
        """From `data`. Raises CheckpointError: something is missing or does not fit."""
        try:
            return cls(**plain, **tensors)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"an input's {cls.name()} is damaged: {error}") from error

    @cached_property
    def digest(self) -> str:
        """Hex digest of everything it is made of."""
        plain, tensors = self.data()
        found = hashlib.sha256(f"{self.name()} {sorted(plain.items())}".encode())
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InputOp) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def spread(values: Tensor, repeat: int, dim: int) -> Tensor:
    """Each run of `dim` entries `repeat` times in a row: [C] -> [C * repeat]."""
    return values.view(-1, 1, dim).expand(-1, repeat, -1).reshape(-1)


def spread_places(places: Tensor, repeat: int, dim: int) -> Tensor:
    """Channels that each channel comes from, as they are behind `spread`: every copy of a run keeps to itself."""
    runs = torch.arange(len(places) // dim).view(-1, 1, 1)
    first = (runs * repeat + torch.arange(repeat).view(1, -1, 1)) * dim
    return (places.view(-1, 1, dim) - runs * dim + first).reshape(-1)


def shortest_run(*places: Tensor) -> int:
    """The shortest run of channels that no channel comes into from outside, int64 [C] each."""
    own = torch.arange(len(places[0]))
    runs = (d for d in range(1, len(own) + 1) if len(own) % d == 0)
    return next(d for d in runs if all(torch.equal(at // d, own // d) for at in places))
