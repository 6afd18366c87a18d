"""What a statistic is: something that calibration measures on the input of linear layers, batch by batch.

Layers that read the same input share one `InputStats`, so its Gram matrix is accumulated once and factorized once.

Where the error of some tokens counts more than that of others, it does so differently for each module that reads the
input, and for groups of a module's outputs. Then `InputStats.of` gives statistics that are measured with those weights.

Shape letters, here and in every statistic: T tokens, K input features, N outputs of a module, B groups of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import ClassVar, Literal, TypeVar, cast
from weakref import proxy

import torch
from torch import Tensor
from typing_extensions import Self

from qtool.numerics.threads.ranks import Ranks


@dataclass(frozen=True)
class Batch:
    """Some tokens, as layers read them.

    Attributes:
        x: inputs, [T, K] of any float type.
        reference: the same tokens as the unquantized model reads them, [T, K]; None where they are not compared.
        weights: how much each token counts, float32 [T]; None: all alike.
    """

    x: Tensor
    reference: Tensor | None = None
    weights: Tensor | None = None

    @cached_property
    def weighted(self) -> Tensor:
        """Inputs times the roots of their weights, of which squares are what counts: [T, K], of the same type."""
        return self.x if self.weights is None else self.times_root(self.x)

    def times_root(self, x: Tensor) -> Tensor:
        """Numbers of each token, [T, K], times the root of its weight."""
        if self.weights is None:
            return x
        return x * self.weights.to(x.device).sqrt().to(x.dtype)[:, None]

    def parts(self) -> Iterator[Batch]:
        """The tokens that have a reference, then those beyond it."""
        compared = 0 if self.reference is None else len(self.reference)
        if compared in (0, len(self.x)):
            yield self if compared else Batch(self.x, None, self.weights)
            return
        for part, reference in ((slice(compared), self.reference), (slice(compared, None), None)):
            yield Batch(self.x[part], reference, None if self.weights is None else self.weights[part])


class Statistic(ABC):
    """One thing that is measured on an input; grown batch by batch.

    Args:
        k: K.
        device: where inputs are.

    Attributes:
        others: the statistics of the same input, this one among them.
    """

    uses: ClassVar[frozenset[type[Statistic]]] = frozenset()
    """Statistics of the same input that this one is computed from. They are measured too, and are told of a batch after
    this one was."""
    sequential: ClassVar[bool] = True
    """Whether methods want it behind the quantized layers before. If not, it serves them as well when it was measured
    on the original model."""
    compares: ClassVar[bool] = False
    """Whether it is about the difference from the unquantized model, so that on that model there is none."""
    unrounded: ClassVar[bool] = False
    """Whether it is about inputs as they are before a runtime rounds them."""

    weighs: ClassVar[Literal["never", "also", "instead"]] = "never"
    """Whether it is measured with weights, where tokens have some: never; also so, as channel ranges do not depend on
    weights; or only so."""

    others: InputStats

    @abstractmethod
    def __init__(self, k: int, device: torch.device | str = "cpu") -> None: ...

    @classmethod
    def name(cls) -> str:
        """What files call it."""
        return cls.__name__.lower()

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Counts a batch, whose tokens are either all compared with a reference or none of them."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Adds what another part of the calibration tokens measured, which is not used any longer."""

    def combine(self, ranks: Ranks) -> None:
        """Adds what other processes measured on their tokens, by rank; afterwards it is the same in all of them."""
        mine = self.state()
        states = ranks.gather({name: t.cpu() for name, t in mine.items()} if self.others.tokens else None)
        for number, state in enumerate(state for state in states if state is not None):
            part = type(self)(self.others.k) if number else self
            part.load({name: t.to(mine[name].device) for name, t in state.items()})
            if number:
                self.merge(part)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that was measured, as tensors by name."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, instead of what was measured so far.

        Raises:
            ValueError: that cannot have been measured on this input; says what is wanted.
        """


S = TypeVar("S", bound=Statistic)


class InputStats:
    """Statistics of one input, grown batch by batch.

    Args:
        k: K.
        needs: which statistics.
        device: where inputs are.
        groups: B of each module that weighs tokens, by name; either all that read the input do, or none.

    Attributes:
        tokens: T so far.
        cache: what methods derived from the finished statistics, kept for the next layer that reads this input.
        weighted: statistics that are measured with weights, for each group of a module's outputs.
    """

    def __init__(
        self,
        k: int,
        needs: frozenset[type[Statistic]],
        device: torch.device | str = "cpu",
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self.k, self.needs, self.tokens = k, needs, 0
        self.cache: dict[object, object] = {}
        kinds, groups = in_order(needs), groups or {}
        weighted = frozenset({kind for kind in kinds if kind.weighs != "never"})
        self.weighted = {name: tuple(InputStats(k, weighted, device) for _ in range(b)) for name, b in groups.items()}
        kinds = [kind for kind in kinds if not (groups and kind.weighs == "instead")]
        self._found: dict[type[Statistic], Statistic] = {kind: kind(k, device) for kind in kinds}
        for statistic in self._found.values():
            statistic.others = proxy(self)  # no cycle: Gram matrices go when the last reader is solved

    def __contains__(self, kind: type[Statistic]) -> bool:
        return kind in self._found

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._found.values())

    def __getitem__(self, kind: type[S]) -> S:
        return cast(S, self._found[kind])

    def get(self, kind: type[S]) -> S | None:
        """A statistic; None if it was not measured."""
        return cast("S | None", self._found.get(kind))

    def of(self, module: str) -> tuple[InputStats, ...]:
        """What counts for each group of a module's outputs; statistics of all tokens alike if it weighs none.

        Groups are rows N b / B to N (b + 1) / B of its matrix, rounded down.
        """
        return self.weighted.get(module, (self,))

    def add(self, x: Tensor, reference: Tensor | None = None, weights: Mapping[str, Tensor] | None = None) -> None:
        """Counts a batch of inputs.

        Args:
            x: [T, K] of any float type.
            reference: the first of these tokens as the unquantized model reads them, [T', K]; batches that have some
                come before those that have none.
            weights: how much each token counts, float32 [T, B], for the modules that weigh tokens, by name.
        """
        for name, groups in self.weighted.items():
            assert weights is not None
            for stats, w in zip(groups, weights[name].unbind(1), strict=True):
                stats.count(Batch(x, reference, w))
        self.count(Batch(x, reference))

    def count(self, batch: Batch) -> None:
        """Has every statistic count a batch, the tokens that have a reference first."""
        for part in batch.parts():
            for statistic in self._found.values():
                statistic.add(part)
            self.tokens += len(part.x)

    def forget(self) -> None:
        """Lets go of what methods derived, when every layer that reads this input is solved."""
        for stats in (self, *chain.from_iterable(self.weighted.values())):
            stats.cache.clear()

    def merge(self, other: InputStats) -> None:
        """Adds what another part of the calibration tokens measured, which is not used any longer."""
        for kind, statistic in self._found.items():
            statistic.merge(other[kind])
        for name, groups in self.weighted.items():
            for stats, more in zip(groups, other.weighted[name], strict=True):
                stats.merge(more)
        self.tokens += other.tokens

    def combine(self, ranks: Ranks) -> None:
        """Adds what other processes measured on their tokens; afterwards all of them have the same."""
        combine((self,), ranks)


def combine(several: Sequence[InputStats], ranks: Ranks) -> None:
    """`InputStats.combine` of several inputs, about whose tokens processes tell each other at once."""
    if ranks.size == 1 or not several:
        return
    counts = [sum(each) for each in zip(*ranks.gather([stats.tokens for stats in several]), strict=True)]
    for stats in several:
        for statistic in stats:
            statistic.combine(ranks)
    combine([each for stats in several for groups in stats.weighted.values() for each in groups], ranks)
    for stats, count in zip(several, counts, strict=True):
        stats.tokens = count


def in_order(needs: frozenset[type[Statistic]]) -> list[type[Statistic]]:
    """Statistics, and those that they use, each before those that it uses."""
    order: list[type[Statistic]] = []

    def put(kind: type[Statistic]) -> None:
        if kind in order:
            order.remove(kind)
        order.append(kind)
        for used in sorted(kind.uses, key=lambda k: k.name()):
            put(used)

    for kind in sorted(needs, key=lambda k: k.name()):
        put(kind)
    return order


def expect(state: Mapping[str, Tensor], like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Compares a state with what it has to look like, (type, shape) by name.

    Raises:
        ValueError: it looks otherwise, or holds NaN or infinity.
    """
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    if found != dict(like):
        raise ValueError(f"wanted {spell(like)}, found {spell(found)}")
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ValueError("wanted finite numbers, found others")


def spell(like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """Types and shapes in words: "low float32 [64], high float32 [64]"."""
    return ", ".join(f"{name} {str(dtype)[6:]} {list(shape)}" for name, (dtype, shape) in like.items()) or "nothing"
