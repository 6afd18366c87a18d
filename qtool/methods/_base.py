"""What a method is: it chooses codes, and knows formats only through their protocol.

A method solves one matrix at a time, where tokens wait in front of it; or a decoder block as a whole, from what another
method found in it matrix by matrix. All methods go the same way: `first.solve` for each matrix, then `solve_block`,
which by default leaves it at that.

Shape letters: S samples, s of them, T tokens per sample, H hidden size, N rows, K columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qtool.formats._base import Format, Quantized
from qtool.numerics.threads.ranks import Ranks
from qtool.residuals._base import Correction, Residual
from qtool.spec import Spec
from qtool.stats._base import InputStats, Statistic


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        quantized: codes and parameters.
        target: the matrix that the codes approximate, float32 [N, K], where that is not the layer's own.
        fallback: what had to be done instead of the method as asked, and why; None if nothing. Goes to the report.
        residuals: what is kept beside the codes, of the kinds that the plan declares, where a method of blocks found it
            itself. Empty: what was found first stays. Methods of matrices find none, because rows are solved apart and
            corrections are of whole matrices; they are asked for codes again instead, see `Residual.turns`.
    """

    quantized: Quantized
    fallback: str | None = None
    target: Tensor | None = None
    residuals: tuple[Correction, ...] = ()


Part = slice | Tensor
"""Some samples: a slice, or int64 indices."""


class States(Protocol):
    """Hidden states of all samples."""

    samples: int

    def __getitem__(self, part: Part) -> Tensor:
        """Those of some samples, [s, T, H], in the type of the walk."""


class MatrixPlan(Protocol):
    """What is to become of a module; `qtool.plan.LayerPlan` is one."""

    @property
    def format(self) -> Format | None:
        """Of its weight."""

    @property
    def activations(self) -> Format | None:
        """What its inputs are rounded to; None: nothing."""

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """What is kept beside the codes, in order."""


def split(samples: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Samples to learn from, and to judge by; see `BlockTask.split`."""
    judging = min(samples - 1, max(1, round(samples * share)))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return order[judging:].sort().values, order[:judging].sort().values


Course = Sequence[tuple[int, float | None, float]]
"""Of a training: (steps done, loss on samples that it learns from, if it was measured; loss on those held out)."""


def ignore(losses: Mapping[str, float], course: Course) -> None:
    """Takes what nobody asked for."""


@dataclass(frozen=True)
class BlockTask:
    """One decoder block, and those of its modules that a method owns.

    Attributes:
        block: its index.
        plans: of the modules that the method owns, by name.
        formats: of their weights; those that want it know the largest weight.
        weights: theirs, float32 [N, K], on the device.
        found: what the start method found while tokens stepped through the block, corrections included, on the device.
        stats: of their inputs, behind the matrices before them that had been solved; for the first group of outputs,
            where groups weigh tokens differently.
        inputs: hidden states in front of the block as the quantized model has them.
        original: the same in the unquantized model, for methods that say `reads_original`; the same object where every
            block reads the unquantized model's.
        targets: what the unquantized block makes of the unquantized model's.
        forward: see `run`.
        device, dtype: where blocks run, and in which type.
        seed: for what is drawn at random.
        token_weights: how much each token's error counts, float32 [S, T]; None: all alike.
        note: takes what the method measured, for the report: losses before and after, by name, and between.
    """

    block: int
    plans: Mapping[str, MatrixPlan]
    formats: Mapping[str, Format]
    weights: Mapping[str, Tensor]
    found: Mapping[str, Solution]
    stats: Mapping[str, InputStats]
    inputs: States
    original: States | None
    targets: States
    forward: Callable[[Tensor, Mapping[str, Tensor], Mapping[str, tuple[Correction, ...]]], Tensor]
    device: torch.device
    dtype: torch.dtype
    seed: int
    token_weights: Tensor | None = None
    note: Callable[[Mapping[str, float], Course], None] = ignore

    def run(
        self, part: Part, weights: Mapping[str, Tensor], residuals: Mapping[str, tuple[Correction, ...]] | None = None
    ) -> Tensor:
        """The block's output for some samples as the quantized model has them, [s, T, H]; differentiable in `weights`.

        Inputs of layers are rounded where the plan says so, with straight-through gradients. Modules that are not
        named, of other methods for example, have their present weights.

        Args:
            part: which samples.
            weights: [N, K] by module, as codes alone decode; norms go by their names too
                ("model.layers.0.input_layernorm").
            residuals: what corrects these weights, by module, in the place of what was found first for it.
        """
        return self.output(self.inputs[part], weights, residuals)

    def output(
        self, x: Tensor, weights: Mapping[str, Tensor], residuals: Mapping[str, tuple[Correction, ...]] | None = None
    ) -> Tensor:
        """The same for hidden states in front of the block, [s, T, H]."""
        corrections = {name: s.residuals for name, s in self.found.items()} | dict(residuals or {})
        whole = dict(weights)
        for name in weights.keys() & corrections.keys():
            for correction in corrections[name]:
                whole[name] = correction.apply(whole[name])
        return self.forward(x, whole, corrections)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """(samples to learn from, samples to judge by), int64 indices, ascending; the same in every block.

        Args:
            share: of the samples that is held out: at least one, if there are two.
        """
        return split(self.inputs.samples, share, self.seed)


class Method(Spec):
    """Chooses codes. The fields of a subclass are its options in a recipe."""

    room: ClassVar[str] = "methods"
    wanted: ClassVar[str] = "a name such as rtn, or {gptq: {damp: 0.01}}"
    reads_original: ClassVar[bool] = False
    """Whether `solve_block` looks at the unquantized model's hidden states, which take as much memory as targets do."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[type[Statistic]]:
        """What calibration has to measure; empty: the method runs without data."""

    def prepare(self, stats: InputStats, fmt: Format) -> None:
        """Called before `solve`, which may then be called for some rows at a time, side by side.

        What all rows share can be computed here and left in `InputStats.cache`.
        """

    def prepare_together(self, stats: InputStats, fmt: Format, ranks: Ranks) -> None:
        """Called in every process of several before `prepare`, which then finds in `InputStats.cache` what is there.

        Args:
            stats: the same in all of them.
            fmt: the representation.
            ranks: the processes.
        """

    @abstractmethod
    def solve(self, w: Tensor, stats: InputStats | None, fmt: Format) -> Solution:
        """Quantizes one matrix.

        Args:
            w: float32 [N, K], finite.
            stats: measured on the K inputs; None if `needs` is empty.
            fmt: the representation to choose codes in.
        """

    def abreast(self, fmt: Format, k: int) -> bool:
        """Whether `solve_abreast` takes matrices of a format and so many columns, on CUDA devices."""
        return False

    def solve_abreast(self, w: Tensor, stats: Sequence[InputStats], fmt: Format) -> Quantized | None:
        """Quantizes several matrices of one size with inputs of their own.

        Args:
            w: float32 [M, N, K], N a multiple of 64.
            stats: measured on the K inputs of each.
            fmt: see `solve`.

        Returns:
            All rows, [M N, K]; None: they have to be solved one by one.
        """
        raise NotImplementedError

    @property
    def first(self) -> Method:
        """What finds first codes while tokens step through a block: the method itself, unless it solves blocks."""
        return self

    def solve_block(self, task: BlockTask) -> dict[str, Solution]:
        """Quantizes the modules of a block that the method owns, by name, when tokens have stepped through it.

        Called where `first` is another method. Solutions that are missing stay as they were found.
        """
        return dict(task.found)
