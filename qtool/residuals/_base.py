"""What a layer keeps beside its codes: w = w_hat + what its residuals add, in the order in which they are declared.

A `Residual` is the declaration: a kind with options, as recipes spell it and as plans and artifacts see it before
anything is computed. What was found for one matrix is a `Correction`: the declaration and its tensors. A `Matrix` is
codes and corrections, all that a runtime needs of a weight.

Shape letters, here and in every residual: N rows (output features), K columns (input features).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import PlanError
from qtool.formats._base import Quantized
from qtool.spec import Spec
from qtool.stats._base import Statistic

Tensors = Mapping[str, Tensor]
"""What a residual stores of one matrix, by name."""
Infos = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and types of such tensors."""


class Residual(Spec):
    """A kind of correction. Instances are immutable, hashable and comparable; the fields of a subclass are its options.

    A subclass implements the abstract methods. What it stores has shapes that follow from N and K, so that plans know
    its size and readers can check headers.

    Attributes:
        turns: how often codes are chosen anew for what the correction leaves, and the correction for these codes, as
            long as that helps.
    """

    room: ClassVar[str] = "residuals"
    wanted: ClassVar[str] = "a name such as low_rank, or {low_rank: {rank: 64}}"

    apart: ClassVar[bool] = False
    """True if it runs beside the codes, on inputs as they are before they are rounded; see `output`."""

    turns: int = Field(0, ge=0, le=20)

    @property
    def label(self) -> str:
        """What plans and reports call it: the name, and the options that are not the default ones."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return " ".join((self.name(), *(f"{key} {value}" for key, value in changed.items())))

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What calibration has to measure on the layer's input; empty: nothing."""
        return frozenset()

    @abstractmethod
    def infos(self, n: int, k: int) -> Infos:
        """What is stored of a matrix of n rows and k columns."""

    @abstractmethod
    def fit(self, error: Tensor, gram: Tensor | None) -> Tensors:
        """Finds what makes up for an error as well as it can.

        Args:
            error: what is missing, W - W_hat, float32 [N, K].
            gram: X^T X of the layer's inputs, float32 [K, K]; None if `needs` does not ask for it, or without data.

        Returns:
            tensors as `infos` says, on the device of the error.
        """

    @property
    def before(self) -> bool:
        """True if it is found of the matrix itself, and codes are chosen for what it leaves."""
        return False

    def output(self, x: Tensor, tensors: Tensors) -> Tensor:
        """What it adds to the outputs of inputs [..., K]: [..., N] of their type. For residuals that are `apart`."""
        raise NotImplementedError

    def jointly(self, w: Tensor, first: Quantized) -> tuple[Quantized, Tensors] | None:
        """Codes and correction of a matrix found together; None: the correction is found for what codes leave.

        Args:
            w: float32 [N, K].
            first: codes that were found without the correction.
        """
        return None

    @abstractmethod
    def apply(self, w_hat: Tensor, tensors: Tensors) -> Tensor:
        """The corrected matrix, float32 [N, K]; `w_hat` itself stays as it is."""

    @abstractmethod
    def rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        """What corrects rows `start` to `stop`."""

    def misfit(self, n: int, k: int) -> str | None:
        """Why a matrix of n rows and k columns cannot have it; None if it can."""
        return None

    def check(self, tensors: Tensors, n: int, k: int) -> None:
        """Refuses what no writer made, in tensors that are as `infos` says and finite. Raises ValueError."""

    def storage_bits(self, n: int, k: int) -> int:
        """Bits that it adds to a matrix of n rows and k columns."""
        return sum(math.prod(shape) * dtype.itemsize * 8 for shape, dtype in self.infos(n, k).values())


@dataclass(frozen=True, eq=False)
class Correction:
    """A residual of one matrix.

    Attributes:
        residual: how the tensors are read.
        tensors: as `residual.infos` says.
    """

    residual: Residual
    tensors: Tensors

    def apply(self, w_hat: Tensor) -> Tensor:
        """The corrected matrix, float32 [N, K]."""
        return self.residual.apply(w_hat, self.tensors)

    def to(self, device: torch.device) -> Correction:
        """The same on a device."""
        return Correction(self.residual, {name: t.to(device) for name, t in self.tensors.items()})

    def rows(self, start: int, stop: int) -> Correction:
        """That of rows `start` to `stop`."""
        return Correction(self.residual, self.residual.rows(self.tensors, start, stop))


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight in quantized form.

    Attributes:
        quantized: codes and parameters.
        residuals: what corrects them, in order.
    """

    quantized: Quantized
    residuals: tuple[Correction, ...] = ()

    def decode(self) -> Tensor:
        """float32 [N, K], the weights that a runtime computes with."""
        w = self.quantized.decode()
        for correction in self.residuals:
            w = correction.apply(w)
        return w

    @property
    def alone(self) -> Quantized:
        """Codes and parameters, for layouts that have nothing beside them. Raises PlanError: there are corrections."""
        if self.residuals:
            labels = ", ".join(correction.residual.label for correction in self.residuals)
            raise PlanError([f"no place for {labels} beside the codes"], "this layout cannot hold a corrected matrix")
        return self.quantized

    def to(self, device: torch.device) -> Matrix:
        """The same on a device."""
        return Matrix(self.quantized.to(device), tuple(correction.to(device) for correction in self.residuals))

    def rows(self, start: int, stop: int) -> Matrix:
        """Rows `start` to `stop`."""
        return Matrix(self.quantized.rows(start, stop), tuple(c.rows(start, stop) for c in self.residuals))


def cost(error: Tensor, gram: Tensor | None) -> Tensor:
    """What each error costs if nothing makes up for it, float32 [N, K]: its square, times H_jj of its input."""
    return error.square() if gram is None else error.square() * gram.diagonal()
