"""What a transform is: it rewrites a model before it is quantized, so that it computes the same and is easier to round.

A transform is asked at every site that it works on, one after the other, for an operation on what is read there. The
operation is folded away along the edge of the model's graph that the site stands for; only at sites of kind "input" it
stays in front of the layers. Transforms know formats only through the rounding of a reader.

Shape letters: C channels of a site, N rows, K columns of a reader (C times `repeat`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from qtool.ops._base import InputOp
from qtool.spec import Spec
from qtool.stats._base import InputStats, S, Statistic
from qtool.stats.channels import Channels

Kind = Literal["norm", "heads", "product", "scores", "stream", "input"]
Scalable = Literal["norm", "heads", "product"]
"""Kinds of sites where every channel can be divided by a factor of its own."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a site and is going to be quantized.

    Attributes:
        weight: reads its weight, float32 [N, K].
        rounded: what becomes of some rows of it, [n, K] -> [n, K]; the second argument is the importance of columns,
            [K], where the layer's method looks at that.
        rounds_inputs: whether its inputs are rounded at run time.
        stats: of what it reads itself: of an expert's input only tokens that come to it; None if nothing was measured.
    """

    weight: Callable[[], Tensor]
    rounded: Callable[[Tensor, Tensor | None], Tensor]
    rounds_inputs: bool
    stats: InputStats | None = None


@dataclass(frozen=True)
class Site:
    """A place where a model can be rewritten.

    Attributes:
        kind: that of the edge, see `qtool.checkpoint.families._edges.Edge`; "input": in front of some layers.
        width: C.
        dim: channels that an orthogonal matrix may mix: those of a head, or all.
        repeat: how many columns of a reader, head by head, read the same channel.
        readers: those that are quantized.
        source: reads the rows that write the channels, float32 [C, ...]; None if no linear layer does.
        stats: of the input of the readers, K wide, at "scores" of the input of the source; None if the transform needs
            none.
        seed: for random choices.
        bias: what the source adds to the channels, float32 [C]; None: nothing.
        rotary: at "scores", how many first channels of a head are rotated, i with i + rotary / 2.
    """

    kind: Kind
    width: int
    dim: int
    repeat: int
    readers: tuple[Reader, ...]
    source: Callable[[], Tensor] | None
    stats: InputStats | None
    seed: int
    rotary: int = 0
    bias: Callable[[], Tensor] | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to go by: no reader is quantized, or statistics were asked for and no token came."""
        return not self.readers or (self.stats is not None and not self.stats.tokens)

    def measured(self, statistic: type[S]) -> S:
        """A statistic that the transform needs."""
        assert self.stats is not None
        return self.stats[statistic]

    def input_range(self) -> Tensor:
        """Largest magnitude that was measured of each channel, float32 [C]."""
        return self.largest(self.measured(Channels).absmax.cpu())

    def weight_range(self) -> Tensor:
        """Largest magnitude among the columns of all readers that read a channel, float32 [C]."""
        return torch.stack([self.largest(reader.weight().abs().amax(0)) for reader in self.readers]).amax(0)

    def largest(self, values: Tensor) -> Tensor:
        """Of the columns that read the same channel, the largest: [K] -> [C]."""
        return self._copies(values).amax(1).reshape(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Of the columns that read the same channel, the mean: [K] -> [C]."""
        return self._copies(values).mean(1).reshape(-1)

    def columns(self, values: Tensor) -> Tensor:
        """A number for each channel as one for each column: [C] -> [K]."""
        runs = values.view(-1, 1, self.width if self.repeat == 1 else self.dim)
        return runs.expand(-1, self.repeat, -1).reshape(-1)

    def _copies(self, values: Tensor) -> Tensor:
        """[K] -> [heads, repeat, dim]."""
        return values.view(-1, self.repeat, self.width if self.repeat == 1 else self.dim)

    def generator(self) -> torch.Generator:
        """For random choices, the same in every run."""
        return torch.Generator().manual_seed(self.seed)


class Transform(Spec):
    """Rewrites a model. The fields of a subclass are its options in a recipe."""

    room: ClassVar[str] = "transforms"
    wanted: ClassVar[str] = "a name such as rotate, or {smooth: {alpha: 0.5}}"

    adds: ClassVar[bool] = False
    """True if it works where layers have biases for what it adds; see `takes_shifts`."""

    @property
    @abstractmethod
    def kinds(self) -> frozenset[Kind]:
        """The sites that it works on."""

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What has to be measured on the inputs of readers; empty: it runs without data."""
        return frozenset()

    @property
    def tried(self) -> Candidates | None:
        """Of what the best is taken; None: the transform itself is asked."""
        return None

    @abstractmethod
    def op(self, site: Site) -> InputOp | None:
        """What is done to what the readers of a site read; None: nothing."""

    def stays(self, width: int) -> InputOp | None:
        """The operation, or one like it, that stays in front of layers with that many columns; None: none does.

        Known before anything is measured, since artifacts have to be able to say it.
        """
        return None

    def misfit(self, kind: Kind, width: int, dim: int) -> str | None:
        """Why it cannot work on a site, with what would; None if it can."""
        return None


@dataclass(frozen=True)
class Candidates:
    """Transforms of which the best are taken.

    Attributes:
        each: some that work one behind the other, for every candidate.
        held_out: share of the samples that judge.
        by: whether every decoder block takes what is best there, or all of the model what is best for it.
    """

    each: tuple[tuple[Transform, ...], ...]
    held_out: float
    by: Literal["block", "model"]


class EdgeTransform(Transform):
    """A transform that is folded away, along the edges of a model's graph that a recipe may name.

    Attributes:
        edges: where.
    """

    edges: tuple[Kind, ...]

    @field_validator("edges")
    @classmethod
    def _some(cls, edges: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if not edges:
            raise ValueError("nowhere to work: name edges")
        return edges

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset(self.edges)


class FactorTransform(EdgeTransform):
    """One that divides channels by factors.

    Attributes:
        edges: where.
    """

    edges: tuple[Scalable, ...] = ("norm", "heads", "product")


def floored(sizes: Tensor, least: float = 1e-3) -> Tensor:
    """Sizes, of which those below `least` of the largest count as that, so that silent channels get no wild factors."""
    return sizes.clamp_min(float(sizes.max()) * least)
