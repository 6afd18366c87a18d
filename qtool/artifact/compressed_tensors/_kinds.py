"""What the layouts of compressed-tensors have in common: each stores some formats of weights, for some kinds of inputs.

A layout is called by `format` of a group in config.json, and says which tensors a matrix becomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._packed import Infos
from qtool.artifact._settings import Settings
from qtool.errors import PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats.fp import FP
from qtool.formats.int import Int

SCALE = "weight_scale"
Read = Callable[..., Tensor]
"""(part, first row, row behind the last) of a matrix; without rows, all of it."""

INT8_INPUTS: tuple[Format, ...] = (Int(bits=8, group="token"), Int(bits=8, group="token", symmetric=False))
FP8_INPUTS = FP(element="e4m3", group="token")
STATIC_INT8: tuple[Format, ...] = (Int(bits=8, group="tensor"), Int(bits=8, group="tensor", symmetric=False))
STATIC_FP8 = FP(element="e4m3", group="tensor")
FP8_BLOCK_INPUTS = FP(element="e4m3", group=128)


class Arguments(Settings):
    """Weights or inputs of a group of config.json, as far as qtool reads them."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None

    @property
    def grouping(self) -> str:
        """The strategy, also where it goes without saying."""
        return self.strategy or ("group" if (self.group_size or 0) > 0 else "tensor")

    def __str__(self) -> str:
        dynamic = "" if self.dynamic is False else ", dynamic" if self.dynamic is True else f", dynamic {self.dynamic}"
        return f"{self.num_bits}-bit {self.type} per {self.grouping}{dynamic}"


class Compressor(ABC):
    """One layout."""

    name: ClassVar[str]

    @abstractmethod
    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """Formats of inputs that weights of a format may have here; None: the layout does not hold such weights."""

    def since(self, fmt: Format) -> str:
        """The oldest version of compressed-tensors that decodes such weights."""
        return "0.15.0"

    @abstractmethod
    def arguments(self, fmt: Format) -> dict[str, Any]:
        """What config.json says about weights in a format."""

    @abstractmethod
    def format(self, scheme: Arguments, scale_dtype: str) -> Format | None:
        """The format of weights that config.json describes; None: not one of this layout.

        Args:
            scheme: from config.json.
            scale_dtype: type of the stored scales, as formats spell it.

        Raises:
            ValidationError: an impossible size.
        """

    @abstractmethod
    def infos(self, fmt: Format, n: int, k: int, dtype: torch.dtype) -> Infos:
        """Names below the module, shapes and types; `dtype` is that of scales that have the model's type."""

    @abstractmethod
    def encode(self, quantized: Quantized, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a matrix. Raises PlanError: a scale is not exact in the type that it is stored in."""

    @abstractmethod
    def decode(self, fmt: Format, k: int, read: Read, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop` of a matrix of k columns."""


def spelled(bits: int, kind: str, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    """The keys that compressed-tensors wants of weights or inputs; only what differs from defaults is in `more`."""
    usual = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group}
    return {**usual, "dynamic": False, **more}


def multiplier(scale: Tensor, module: str) -> Tensor:
    """What is stored for the scale of a whole matrix, float64 [1]: its reciprocal, float32.

    Raises:
        PlanError: it has none that is exact.
    """
    found = (1.0 / scale).float()
    if bool((1.0 / found.double() != scale).any()):
        line = f"{module}: the scale of the whole matrix is not the reciprocal of a float32 number"
        raise PlanError([line], "compressed-tensors stores that reciprocal")
    return found
