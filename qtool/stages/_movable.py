"""What moves of a quantized model: scales and offsets of matrices, their codes, and weights of norms.

A variable of scales and norms is relative, 0 where nothing moved. What a model computes with is what its file can hold;
gradients go straight through that rounding (https://arxiv.org/abs/1308.3432). So scales of few bits, and powers of two,
step when their variable has come half of the way to the next one, or stay. Where codes move, a model that learns
computes with what `qtool.methods._relaxed` says of them.

Shape letters: N rows, K columns, G groups, H channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qtool.formats._base import Params, expand, levels_on
from qtool.methods._relaxed import Relaxed
from qtool.residuals._base import Matrix
from qtool.store.overlay import CODES


class Movable(ABC):
    """One tensor that a model computes with, and what moves of it."""

    @abstractmethod
    def variables(self) -> Iterator[Tensor]:
        """float32, from 0."""

    def decisive(self) -> Iterator[Tensor]:
        """Variables that decide on codes, float32."""
        yield from ()

    def soften(self, progress: float | None, seed: int = 0) -> None:
        """Says what `value` is of from now on: of training that has come so far, or (None) of a file.

        Args:
            progress: share of the training that is done.
            seed: of what a step draws at random.
        """
        del progress, seed  # most of what moves is always what a file holds

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
        self.moved = False

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
        if not self.moved:
            return quantized.params
        offset = self.offset if self.shift is None else self.offset + self.scale * self.shift
        return quantized.format.refit(quantized.params, self.scale * (1 + self.factor), offset)

    def replaced(self) -> Params:
        """What takes the place of what was found."""
        return self.params()

    def value(self) -> Tensor:
        """See `Movable.value`: float32 [N, K]."""
        return replace(self.matrix, quantized=replace(self.matrix.quantized, params=self.params())).decode()

    def pull(self, gradient: Tensor) -> None:
        """See `Movable.pull`. An offset that is not free is a fixed multiple of the scale."""
        self.moved = True  # whoever asks for gradients moves what they are of
        quantized = self.matrix.quantized
        k, groups = quantized.codes.shape[1], self.scale.shape[1]
        unit = levels_on(quantized.format, gradient.device)[quantized.codes.long()]
        if self.shift is None:
            unit = unit + expand(self.offset / torch.where(self.scale == 0, torch.inf, self.scale), k)
        add(self.factor, (gradient * unit).view(len(gradient), groups, -1).sum(2) * self.scale)
        if self.shift is not None:
            add(self.shift, gradient.view(len(gradient), groups, -1).sum(2) * self.scale)


class MovableCodes(Movable):
    """A matrix whose codes move, its scales as well if they are trained.

    Args:
        matrix: as it was found, of a scalar format, on the device.
        relaxed: what is trained, beginning there.
    """

    def __init__(self, matrix: Matrix, relaxed: Relaxed) -> None:
        self.matrix, self.relaxed = matrix, relaxed
        self.progress: float | None = None
        self.seed = 0

    @staticmethod
    def can(matrix: Matrix) -> bool:
        """Whether every weight has a code of its own."""
        return matrix.quantized.format.codebook() is None

    def variables(self) -> Iterator[Tensor]:
        """See `Movable.variables`; factors of scales begin with 1."""
        yield from (variable for variable, decides in self.relaxed.leaves() if not decides)

    def decisive(self) -> Iterator[Tensor]:
        """See `Movable.decisive`."""
        yield from (variable for variable, decides in self.relaxed.leaves() if decides)

    def soften(self, progress: float | None, seed: int = 0) -> None:
        """See `Movable.soften`."""
        self.progress, self.seed = progress, seed

    def replaced(self) -> Params:
        """Parameters, and codes."""
        found = self.relaxed.solution()
        return {**found.params, CODES: found.codes}

    @torch.no_grad()
    def value(self) -> Tensor:
        """See `Movable.value`: float32 [N, K]."""
        if self.progress is None:
            return replace(self.matrix, quantized=self.relaxed.solution()).decode()
        return self.softened(self.progress)

    def softened(self, progress: float) -> Tensor:
        """float32 [N, K], with gradients, the same whenever a step asks for it."""
        self.relaxed.generator.manual_seed(self.seed)
        w = self.relaxed.weights(progress)
        for correction in self.matrix.residuals:
            w = correction.apply(w)
        return w

    @torch.enable_grad()
    def pull(self, gradient: Tensor) -> None:
        """See `Movable.pull`."""
        leaves = [variable for variable, _ in self.relaxed.leaves()]
        found = torch.autograd.grad(self.softened(self.progress or 0.0), leaves, gradient)
        for variable, slope in zip(leaves, found, strict=True):
            add(variable, slope)


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
