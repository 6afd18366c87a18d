"""How a matrix's rounding becomes something to be trained: what moves, what it decodes to, which codes it ends in.

Every way begins where another method ended, as nearly as it can say that, and works for every scalar format; scales,
and offsets where they are free, may move along, relative to where they began. A weight's place among the levels is
counted in steps, see `_soft`. Here is what rounds on every step, gradients going straight through; `_mixtures` has what
rounds in the end.

Shape letters: N rows, K columns, G groups, R rank, L levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from qtool.formats._base import Quantized, expand
from qtool.methods._fixed import FixedRounding
from qtool.methods._soft import harden, level_at, places, relative, soft_decode, soft_start


class Relaxed(ABC):
    """What is trained of one matrix.

    Args:
        w: original weights, float32 [N, K].
        start: codes and parameters of a scalar format to begin with, on the device.
        scales: whether scales and free offsets move.
        generator: for what is drawn at random, on the device.

    Attributes:
        by_row: whether rows know nothing of each other.
        repeats: whether every step does the same, whatever is done of the training, and draws nothing at random.
        first: scales and offsets to begin with, float32 [N, G].
        dtype: in which the weights of a step are wanted; a way that has them in float32 anyway gives these.
    """

    dtype: torch.dtype = torch.float32
    by_row: ClassVar[bool] = True
    repeats: ClassVar[bool] = True

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        self.w, self.fmt, self.start, self.generator = w, start.format, start, generator
        self.first = self.fmt.affine(start.params)
        scale, _ = self.first
        self.factor = torch.ones_like(scale).requires_grad_() if scales else None
        self.shift = torch.zeros_like(scale).requires_grad_() if scales and self.fmt.free_offset else None

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The wanted scale and offset, float32 [N, G], with gradients; None where they stay."""
        scale, offset = self.first
        return (
            None if self.factor is None else scale * self.factor,
            None if self.shift is None else offset + scale * self.shift,
        )

    def wide(self) -> tuple[Tensor, Tensor]:
        """First scales and offsets of each weight, float32 [N, K]."""
        scale, offset = self.first
        return expand(scale, self.w.shape[1]), expand(offset, self.w.shape[1])

    def leaves(self) -> Iterator[tuple[Tensor, bool]]:
        """All that is trained, and whether it decides on rounding."""
        yield from ((variable, True) for variable in self.rounding())
        yield from ((p, False) for p in (self.factor, self.shift) if p is not None)

    @abstractmethod
    def rounding(self) -> Iterator[Tensor]:
        """What is trained besides scales and offsets."""

    @abstractmethod
    def weights(self, progress: float) -> Tensor:
        """As a step of the training sees them, [N, K], with gradients; see `dtype`.

        Args:
            progress: share of the training that is done.
        """

    @abstractmethod
    def solution(self) -> Quantized:
        """Codes and parameters, as they are now."""

    def penalty(self, progress: float) -> Tensor | None:
        """What a step adds to its loss, a mean over weights; None: nothing."""
        return None


class ShiftedPlaces(Relaxed):
    """A variable is added to each place before it is rounded (AutoRound, https://arxiv.org/abs/2309.05516).

    Where scales stay, so do places, and the sum of both is the variable.
    """

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        self.fixed = None if scales else FixedRounding(self.fmt, start.params)
        self.v = (places(w, start)[1] if self.fixed else soft_start(w, start)).requires_grad_()

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield self.v

    def weights(self, progress: float) -> Tensor:
        """See `Relaxed.weights`."""
        if self.fixed:
            return self.fixed(self.v, self.dtype)
        return soft_decode(self.w, self.v, self.fmt, self.start.params, *self.affine())

    def solution(self) -> Quantized:
        """See `Relaxed.solution`."""
        if self.fixed:
            return Quantized(self.fixed.codes(self.v), self.start.params, self.fmt)
        return harden(self.w, self.v, self.fmt, self.start.params, *self.affine())


class Moved(Relaxed):
    """Ways in which other weights are rounded to nearest."""

    @abstractmethod
    def moved(self) -> Tensor:
        """The weights that are rounded, float32 [N, K], with gradients."""

    def weights(self, progress: float) -> Tensor:
        """See `Relaxed.weights`."""
        w = self.moved()
        return soft_decode(w, torch.zeros_like(w), self.fmt, self.start.params, *self.affine())

    @torch.no_grad()
    def solution(self) -> Quantized:
        """See `Relaxed.solution`."""
        w = self.moved()
        return harden(w, torch.zeros_like(w), self.fmt, self.start.params, *self.affine())


class Unmoved(Moved):
    """Only scales and offsets move, with which weights are clipped (OmniQuant, https://arxiv.org/abs/2308.13137)."""

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield from ()

    def moved(self) -> Tensor:
        """See `Moved.moved`."""
        return self.w


class ShiftedWeights(Moved):
    """A variable is added to each weight, in steps of the first scales.

    With scales and offsets that is Block-AP (EfficientQAT, https://arxiv.org/abs/2407.11062).
    """

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        scale, offset = self.wide()
        self.unit = scale * (self.fmt.levels().to(w.device).diff().amin())
        begin = nearest(w, start, scale, offset)
        self.v = relative(begin - w, self.unit, 0.0).requires_grad_()

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield self.v

    def moved(self) -> Tensor:
        """See `Moved.moved`."""
        return self.w + self.unit * self.v


class Divided(Moved):
    """Weights are divided by one variable each, and by one of their row (FlexRound, https://arxiv.org/abs/2306.00317).

    Variables are logarithms, so that what divides is positive.
    """

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        scale, self.zero = self.wide()
        have, want = w - self.zero, nearest(w, start, scale, self.zero) - self.zero
        self.v = torch.where(have * want > 0, (have / want).log(), 0.0).requires_grad_()
        self.row = torch.zeros_like(w[:, :1]).requires_grad_()

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield from (self.v, self.row)

    def moved(self) -> Tensor:
        """See `Moved.moved`."""
        return self.zero + (self.w - self.zero) * torch.exp(-(self.v + self.row))


class DividedLowRank(Moved):
    """The same, logarithms being a matrix of low rank and vectors (LRQ, https://arxiv.org/abs/2407.11534).

    It cannot begin with anything but the nearest codes. The rank is a fourth of the shorter side, as the paper's 1024
    of 4096 are; but not below `RANK`, where there are so many rows and columns.
    """

    RANK = 16
    by_row = False

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        self.zero, rank = self.wide()[1], min(max(self.RANK, min(w.shape) // 4), *w.shape)
        self.left = torch.zeros_like(w[:, :rank]).requires_grad_()
        drawn = torch.randn(rank, w.shape[1], generator=generator, device=w.device)
        self.right = (drawn / rank**0.5).requires_grad_()
        self.row, self.column = (torch.zeros_like(part).requires_grad_() for part in (w[:, :1], w[:1]))

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield from (self.left, self.right, self.row, self.column)

    def moved(self) -> Tensor:
        """See `Moved.moved`."""
        logarithm = self.left @ self.right + self.row + self.column
        return self.zero + (self.w - self.zero) * torch.exp(-logarithm)


def nearest(w: Tensor, start: Quantized, scale: Tensor, offset: Tensor) -> Tensor:
    """The weights nearest to `w` that round to the codes, float32 [N, K]; `scale`, `offset`: of each weight, [N, K]."""
    y, inside = places(w, start)
    value = level_at(inside, start.format.levels().to(w.device))[0]
    return torch.where(y == inside, w, scale * value + offset)
