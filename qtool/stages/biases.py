"""Biases make up for the mean error of outputs: b' = b + W mean(x_0) - W_hat mean(x).

Rounding a weight, and the drift of what the layer reads, move the mean of every output. Where the model has a bias,
that costs nothing to take back. x_0 are inputs of the model as it was, x those of the quantized one, rounded as a
runtime does, layer by layer behind biases that are corrected already: Nagel et al., https://arxiv.org/abs/1906.04721,
with calibration data. Layers without a bias stay as they are.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from qtool.calibrate.hidden import Hidden
from qtool.checkpoint._base import Module
from qtool.stages._base import Stage, StageResult, StageTask
from qtool.stats._base import InputStats, Statistic
from qtool.stats.means import Means


class Biases(Stage):
    """Bias correction."""

    def run(self, task: StageTask) -> StageResult:
        """See `Stage.run`."""
        assert task.tokens is not None  # see `needs_tokens`
        correction = Correcting(task)
        found = correction.all()
        about = {"biases": float(len(found)), "mean shift": correction.moved / max(len(found), 1)}
        return StageResult(tensors=found, about=about)


class Correcting:
    """Both models of a task side by side.

    Args:
        task: what there is to correct.

    Attributes:
        before: runs what was rounded.
        behind: runs the quantized model.
        moved: root mean squares of what was added to biases, relative to those of the outputs' means, added up.
        needs: what is measured of the quantized model's inputs.
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Means})

    def __init__(self, task: StageTask) -> None:
        self.task, self.moved = task, 0.0
        self.before, self.behind = task.walker(task.unrounded), task.walker(task.model)
        self.names = set(task.model.names())

    def all(self) -> dict[str, Tensor]:
        """Corrected biases by name."""
        assert self.task.tokens is not None
        before, behind = (walker.embed(self.task.tokens) for walker in (self.before, self.behind))
        count, found = len(self.behind.blocks), dict[str, Tensor]()
        for i in range(count):
            found |= dict(self.block(i, before, behind))
            self.task.progress(i + 1, count, "")
        return found

    def block(self, i: int, before: Hidden, behind: Hidden) -> Iterator[tuple[str, Tensor]]:
        """Corrected biases of block i by name, in its own type; both hidden states go on behind it."""
        modules = [m for m in self.behind.modules[i] if self.corrects(m)]
        wanted, means = dict[str, Tensor](), {m.reads: frozenset[type[Statistic]]({Means}) for m in modules}
        for step in self.before.steps(self.before.load_block(i), i, before, means):
            wanted |= {reads: stats[Means].mean for reads, stats in step.items()}
        block = self.behind.load_block(i)
        with self.behind.quantized_inputs(block, i):
            for step in self.behind.steps(block, i, behind, dict.fromkeys(means, self.needs)):
                for reads, stats in step.items():
                    for module in (m for m in modules if m.reads == reads):
                        linear = cast(nn.Linear, self.behind.linear(block, module))
                        yield from self.correct(linear, module, wanted[reads], stats)

    def corrects(self, module: Module) -> bool:
        """Whether a module has a bias, is quantized, and reads every token."""
        return module.name in self.task.model.layers and module.expert is None and f"{module.name}.bias" in self.names

    def correct(
        self, linear: nn.Linear, module: Module, wanted: Tensor, stats: InputStats
    ) -> Iterator[tuple[str, Tensor]]:
        """Puts the corrected bias of a module in place, and yields it by name.

        Args:
            linear: the module in its block.
            module: which one it is.
            wanted: means of its inputs in the model as it was, float64 [K].
            stats: of those in the quantized one.
        """
        q = self.task.model.matrix(module.name).to(wanted.device).decode()
        yield from self.recentred(linear, module, q, wanted, stats[Means].mean)

    def recentred(
        self, linear: nn.Linear, module: Module, q: Tensor, wanted: Tensor, found: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """A bias that gives outputs of the matrix q [N, K] the mean they had, by means of both models' inputs [K]."""
        name = f"{module.name}.bias"
        before = self.task.unrounded.tensor(f"{module.name}.weight").to(wanted) @ wanted
        shift, stored = before - q.to(wanted) @ found, self.task.model.tensor(name)
        self.moved += float(shift.norm() / (before + stored.to(before)).norm().clamp_min(torch.finfo().tiny))
        bias = (stored.to(shift) + shift).to(stored.device, stored.dtype)
        linear.bias.data = bias.to(self.task.device, self.task.dtype)
        yield name, bias
