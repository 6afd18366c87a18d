"""Quantized matrices as their files have them: a run that changes nothing of them need not decode them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.raw_bytes import Stretch


@dataclass(frozen=True)
class Parts:
    """The tensors that a matrix is packed into.

    Attributes:
        layout: whose they are; what packs the same matrix into tensors of the same names, shapes and types there packs
            it into the same numbers.
        infos: by their names below the module.
        places: where their bytes are.
        check: takes the bytes of one, piece by piece; raises NumericsError: what they hold is not finite.
    """

    layout: str
    infos: Mapping[str, TensorInfo]
    places: Mapping[str, Stretch]
    check: Callable[[str, Tensor], None]

    def are(self, other: Parts) -> bool:
        """Whether other ones are laid out alike."""
        return self.layout == other.layout and dict(self.infos) == dict(other.infos)


@runtime_checkable
class HasParts(Protocol):
    """A checkpoint that can give matrices as they are stored."""

    def as_stored(self, module: str) -> Parts | None:
        """The tensors of one; None: they are to be decoded."""


def parts_of(checkpoint: Checkpoint, module: str) -> Parts | None:
    """The tensors of a matrix as its file has them; None: there are none, or nobody can take them over as they are."""
    return checkpoint.as_stored(module) if isinstance(checkpoint, HasParts) else None
