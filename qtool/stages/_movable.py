"""What moves of a quantized model: scales and offsets of matrices, their codes, and weights of norms.

A variable is relative, 0 where nothing moved; that of a code is its place among the levels, counted in steps. What a
model computes with is always what its file can hold; gradients go straight through that rounding
(https://arxiv.org/abs/1308.3432). So scales of few bits, and powers of two, step when their variable has come half of
the way to the next one, or stay.

Shape letters: N rows, K columns, G groups, H channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qtool.formats._base import Params, Quantized, expand
from qtool.methods._soft import level_at, soft_place
from qtool.residuals._base import Matrix
from qtool.store.overlay import CODES


class Movable(ABC):
    """One tensor that a model computes with, and what moves of it."""

    @abstractmethod
    def variables(self) -> Iterator[Tensor]:
        """float32, from 0."""

    def places(self) -> Iterator[Tensor]:
        """Variables that are rounded to codes, float32, in steps between levels."""
        yield from ()

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
        moves: False: they stay.
    """

    def __init__(self, matrix: Matrix, moves: bool = True) -> None:
        self.matrix, self.moves, fmt = matrix, moves, matrix.quantized.format
        self.scale, self.offset = fmt.affine(matrix.quantized.params)
        self.factor = torch.zeros_like(self.scale)
        self.shift = torch.zeros_like(self.scale) if fmt.free_offset else None

    @staticmethod
    def can(matrix: Matrix) -> bool:
        """Whether rows have scales of their own; what they share no single row can move."""
        return matrix.quantized.format.group_rows == 1

    def variables(self) -> Iterator[Tensor]:
        """See `Movable.variables`."""
        yield from (v for v in (self.factor, self.shift) if self.moves and v is not None)

    def params(self) -> Params:
        """Parameters as the format stores them; those that were found where nothing moved."""
        quantized = self.matrix.quantized
        if not any(bool(v.any()) for v in self.variables()):
            return quantized.params
        offset = self.offset if self.shift is None else self.offset + self.scale * self.shift
        return quantized.format.refit(quantized.params, self.scale * (1 + self.factor), offset)

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return self.matrix.quantized.codes

    def replaced(self) -> Params:
        """What takes the place of what was found: parameters, and codes where these move."""
        return self.params()

    def value(self) -> Tensor:
        """See `Movable.value`: float32 [N, K]."""
        quantized = Quantized(self.codes(), self.params(), self.matrix.quantized.format)
        return replace(self.matrix, quantized=quantized).decode()

    def pull(self, gradient: Tensor) -> None:
        """See `Movable.pull`. An offset that is not free is a fixed multiple of the scale."""
        if not self.moves:
            return
        codes, groups = self.codes(), self.scale.shape[1]
        unit = self.matrix.quantized.format.levels().to(gradient.device)[codes.long()]
        if self.shift is None:
            unit = unit + expand(self.offset / torch.where(self.scale == 0, torch.inf, self.scale), codes.shape[1])
        add(self.factor, (gradient * unit).view(len(gradient), groups, -1).sum(2) * self.scale)
        if self.shift is not None:
            add(self.shift, gradient.view(len(gradient), groups, -1).sum(2) * self.scale)


class Codes(Scales):
    """A matrix whose codes move, its scales as well if they may.

    Args:
        matrix: as it was found, of a scalar format, on the device.
        w: what was rounded, float32 [N, K].
        moves: whether scales move.
    """

    def __init__(self, matrix: Matrix, w: Tensor, moves: bool) -> None:
        super().__init__(matrix, moves)
        self.levels = matrix.quantized.format.levels().to(w.device)
        self.place = soft_place(w, matrix.quantized)

    @staticmethod
    def can(matrix: Matrix) -> bool:
        """Whether every weight has a code of its own."""
        return matrix.quantized.format.codebook() is None

    def places(self) -> Iterator[Tensor]:
        """See `Movable.places`."""
        yield self.place

    def codes(self) -> Tensor:
        """See `Scales.codes`."""
        return self.place.round().clamp_(0, len(self.levels) - 1).to(torch.uint8)

    def replaced(self) -> Params:
        """See `Scales.replaced`."""
        return {**self.params(), CODES: self.codes()}

    def pull(self, gradient: Tensor) -> None:
        """See `Movable.pull`. What is beyond the ends goes no further that way, and may come back."""
        super().pull(gradient)
        fmt = self.matrix.quantized.format
        scale, width = expand(fmt.affine(self.params())[0], gradient.shape[1]), level_at(self.place, self.levels)[1]
        slope = gradient * scale * width
        ends = (self.place > len(self.levels) - 1) & (slope < 0) | (self.place < 0) & (slope > 0)
        add(self.place, slope.masked_fill_(ends, 0.0))


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
