"""What moves behind codes that stay: scales and offsets of matrices, on the grid of their format, and weights of norms.

A variable is relative, 0 where nothing moved. What a model computes with is always what its file can hold; gradients go
straight through that rounding (https://arxiv.org/abs/1308.3432). So scales of few bits, and powers of two, step when
their variable has come half of the way to the next one, or stay.

Shape letters: N rows, K columns, G groups, H channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qtool.formats._base import Params, expand
from qtool.residuals._base import Matrix


class Movable(ABC):
    """One tensor that a model computes with, and what moves of it."""

    @abstractmethod
    def variables(self) -> Iterator[Tensor]:
        """float32, from 0."""

    @abstractmethod
    def value(self) -> Tensor:
        """The tensor as a file holds it now, on the device."""

    @abstractmethod
    def pull(self, gradient: Tensor) -> None:
        """Adds to gradients of variables, given that by the tensor."""


class Scales(Movable):
    """A matrix whose scales, and offsets where they are free, move.

    Args:
        matrix: as it was found, on the device.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, fmt = matrix, matrix.quantized.format
        self.scale, self.offset = fmt.affine(matrix.quantized.params)
        self.factor = torch.zeros_like(self.scale)
        self.shift = torch.zeros_like(self.scale) if fmt.free_offset else None

    @staticmethod
    def can(matrix: Matrix) -> bool:
        """Whether rows have scales of their own; what they share no single row can move."""
        return matrix.quantized.format.group_rows == 1

    def variables(self) -> Iterator[Tensor]:
        """See `Movable.variables`."""
        yield from (v for v in (self.factor, self.shift) if v is not None)

    def params(self) -> Params:
        """Parameters as the format stores them; those that were found where nothing moved."""
        quantized = self.matrix.quantized
        if not any(bool(v.any()) for v in self.variables()):
            return quantized.params
        offset = self.offset if self.shift is None else self.offset + self.scale * self.shift
        return quantized.format.refit(quantized.params, self.scale * (1 + self.factor), offset)

    def value(self) -> Tensor:
        """See `Movable.value`: float32 [N, K]."""
        return replace(self.matrix, quantized=replace(self.matrix.quantized, params=self.params())).decode()

    def pull(self, gradient: Tensor) -> None:
        """See `Movable.pull`. An offset that is not free is a fixed multiple of the scale."""
        quantized = self.matrix.quantized
        k, groups = quantized.codes.shape[1], self.scale.shape[1]
        unit = quantized.format.levels().to(gradient.device)[quantized.codes.long()]
        if self.shift is None:
            unit = unit + expand(self.offset / torch.where(self.scale == 0, torch.inf, self.scale), k)
        add(self.factor, (gradient * unit).view(len(gradient), groups, -1).sum(2) * self.scale)
        if self.shift is not None:
            add(self.shift, gradient.view(len(gradient), groups, -1).sum(2) * self.scale)


class MovableVector(Movable):
    """A vector that moves as a whole, such as the weights of a norm.

    Args:
        values: as they were found, [H], in the type that files hold, on the device.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.size = values.float().abs().mean().clamp_min(1e-6)
        self.change = torch.zeros_like(values, dtype=torch.float32)

    def variables(self) -> Iterator[Tensor]:
        """See `Movable.variables`: relative to the mean magnitude."""
        yield self.change

    def value(self) -> Tensor:
        """See `Movable.value`: [H]."""
        return (self.values.float() + self.size * self.change).to(self.values.dtype)

    def pull(self, gradient: Tensor) -> None:
        """See `Movable.pull`."""
        add(self.change, gradient.float() * self.size)


def add(variable: Tensor, gradient: Tensor) -> None:
    """Adds to a variable's gradient."""
    variable.grad = gradient if variable.grad is None else variable.grad + gradient
