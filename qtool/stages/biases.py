"""Biases make up for the mean error of outputs: b' = b + W mean(x_0) - W_hat mean(x).

Rounding a weight, and the drift of what the layer reads, move the mean of every output. Where the model has a bias,
that costs nothing to take back. x_0 are inputs of the model as it was, x those of the quantized one, rounded as a
runtime does, layer by layer behind biases that are corrected already: Nagel et al., https://arxiv.org/abs/1906.04721,
with calibration data. Layers without a bias stay as they are.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.calibrate.hidden import Hidden
from qtool.checkpoint._base import Module
from qtool.stages._base import Stage, StageResult, StageTask
from qtool.stats.means import Means


class Biases(Stage):
    """Bias correction."""

    def run(self, task: StageTask) -> StageResult:
        """See `Stage.run`."""
        assert task.tokens is not None  # see `needs_tokens`
        correction = Correcting(task)
        before, behind = (walker.embed(task.tokens) for walker in (correction.before, correction.behind))
        count, found = len(correction.behind.blocks), dict[str, Tensor]()
        for i in range(count):
            found |= dict(correction.block(i, before, behind))
            task.progress(i + 1, count, "")
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
    """

    def __init__(self, task: StageTask) -> None:
        self.task, self.moved = task, 0.0
        self.before, self.behind = task.walker(task.unrounded), task.walker(task.model)
        self.names = set(task.model.names())

    def block(self, i: int, before: Hidden, behind: Hidden) -> Iterator[tuple[str, Tensor]]:
        """Corrected biases of block i by name, in its own type; both hidden states go on behind it."""
        modules = [m for m in self.behind.modules[i] if self.corrects(m)]
        needs = {m.reads: frozenset({Means}) for m in modules}
        wanted = dict[str, Tensor]()
        for step in self.before.steps(self.before.load_block(i), i, before, needs):
            wanted |= {reads: stats[Means].mean for reads, stats in step.items()}
        block = self.behind.load_block(i)
        with self.behind.quantized_inputs(block, i):
            for step in self.behind.steps(block, i, behind, needs):
                for reads, stats in step.items():
                    for module in (m for m in modules if m.reads == reads):
                        bias = self.corrected(module, wanted[reads], stats[Means].mean)
                        self.behind.linear(block, module).bias.data = bias.to(self.task.device, self.task.dtype)
                        yield f"{module.name}.bias", bias

    def corrects(self, module: Module) -> bool:
        """Whether a module has a bias, is quantized, and reads every token."""
        return module.name in self.task.model.layers and module.expert is None and f"{module.name}.bias" in self.names

    def corrected(self, module: Module, wanted: Tensor, found: Tensor) -> Tensor:
        """A bias [N] that gives outputs the mean they had, by means of both models' inputs, float64 [K]."""
        weight, bias = f"{module.name}.weight", f"{module.name}.bias"
        before = self.task.unrounded.tensor(weight).to(wanted) @ wanted
        shift = before - self.task.model.matrix(module.name).to(wanted.device).decode().to(wanted) @ found
        stored = self.task.model.tensor(bias)
        self.moved += float(shift.norm() / (before + stored.to(before)).norm().clamp_min(torch.finfo().tiny))
        return (stored.to(shift) + shift).to(stored.device, stored.dtype)
