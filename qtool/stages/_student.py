"""A quantized model some of whose tensors move, and how far its predictions are from those of the original.

It is run block by block. For gradients, hidden states of a batch are kept in front of every block, and each block is
run again from the last one on, so a model that does not fit into memory can learn. Blocks are kept where they do fit.

Shape letters: S samples, s of them, T tokens per sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qtool.calibrate.blocks import TABLE_VALUES
from qtool.calibrate.gradients import head_gradient
from qtool.calibrate.hidden import waiting_limit
from qtool.calibrate.walker import Walker
from qtool.methods.learned import WAYS, Way
from qtool.numerics.checks import checked_later
from qtool.numerics.product import float32_product
from qtool.numerics.threads.parallel import side_by_side
from qtool.stages._base import StageTask
from qtool.stages._movable import Movable, MovableCodes, MovableVector, Scales


class Teacher:
    """What the original model predicts.

    Args:
        walker: over it.
        tokens: int64 [S, T].
    """

    def __init__(self, walker: Walker, tokens: Tensor) -> None:
        self.walker, self.hidden = walker, walker.embed(tokens)
        for i in range(len(walker.blocks)):
            walker.advance(walker.load_block(i), i, self.hidden)
        self.cap = walker.family.logit_softcap(walker.checkpoint.config)

    def log_probabilities(self, sample: int, positions: slice) -> Tensor:
        """Of the tokens that follow some positions, float32 [t, V]."""
        norm, weight = self.walker.output_layer()
        with torch.no_grad():
            y = norm(self.hidden[sample : sample + 1].to(self.walker.device))[0, positions]
            logits = float32_product(y, weight, TABLE_VALUES)
            if self.cap is not None:
                logits = logits.div_(self.cap).tanh_().mul_(self.cap)
            return logits.log_softmax(-1)


class Student:
    """The quantized model.

    Args:
        task: names it.
        teacher: the original one, on the same tokens.
        scales: whether scales of matrices move.
        norms: whether norms do.
        rounding: how codes do; None: they stay.

    Attributes:
        moving: what moves, by the module's name, block by block, and the final norm last.
    """

    def __init__(
        self, task: StageTask, teacher: Teacher, scales: bool, norms: bool, rounding: Way | None = None
    ) -> None:
        assert task.tokens is not None
        self.task, self.teacher, self.walker = task, teacher, task.walker(task.model)
        self.embedded = self.walker.embed(task.tokens)
        self.walker.block_arguments(self.embedded.length)  # recorded before threads ask for them
        count = len(self.walker.blocks)
        self.moving: list[dict[str, Movable]] = [
            (self.matrices(i, scales, rounding) if scales or rounding else {}) | (self.norms(i) if norms else {})
            for i in range(count)
        ]
        final = self.walker.family.norm
        self.last: dict[str, Movable] = {final: MovableVector(self.stored(f"{final}.weight"))} if norms else {}
        self.kept: dict[int, nn.Module] = {}
        self.values, self.learning = dict[int, dict[str, Tensor]](), False
        numbers = sum(m.shape[0] * m.shape[1] for i in self.walker.modules for m in self.walker.modules[i])
        self.keeps = numbers * task.dtype.itemsize <= waiting_limit(task.device)

    def stored(self, name: str) -> Tensor:
        """A tensor as the model's file holds it, on the device."""
        return self.task.model.tensor(name).to(self.task.device, self.task.model.info(name).dtype)

    def matrices(self, i: int, scales: bool, rounding: Way | None) -> dict[str, Movable]:
        """Matrices of a block that can move, by the module's name."""
        found: dict[str, Movable] = {}
        drawn = torch.Generator(self.task.device)
        for name in (p.module.name for p in self.task.layers if p.module.block == i):
            matrix = self.task.model.matrix(name).to(self.task.device)
            if rounding and MovableCodes.can(matrix):
                w = self.task.unrounded.tensor(f"{name}.weight").to(self.task.device, torch.float32)
                drawn.manual_seed(self.task.seed + len(found))
                free = scales and Scales.can(matrix)
                found[name] = MovableCodes(matrix, WAYS[rounding](w, matrix.quantized, free, drawn))
            elif scales and Scales.can(matrix):
                found[name] = Scales(matrix)
        return found

    def norms(self, i: int) -> dict[str, Movable]:
        """Norms of a block, by the module's name."""
        prefix = self.walker.family.block_prefix.format(i=i)
        shapes = self.walker.family.block_shapes(self.walker.checkpoint.config, i)
        names = (name for name, shape in shapes.items() if len(shape) == 1 and name.endswith("norm.weight"))
        return {prefix + n.removesuffix(".weight"): MovableVector(self.stored(prefix + n)) for n in names}

    def everything(self) -> dict[str, Movable]:
        """All that moves, by the module's name."""
        return {name: movable for moving in (*self.moving, self.last) for name, movable in moving.items()}

    def weights(self, i: int, back: bool = False) -> dict[str, Tensor]:
        """What moves in a block, as it is now; where models fit, a way back finds what the way forth computed."""
        found = self.values.pop(i, None) if back else None
        if found is None:
            with checked_later():  # see `distill.result`
                found = {name: m.value().to(self.task.dtype) for name, m in self.moving[i].items()}
            if self.keeps and self.learning and not back:
                self.values[i] = found
        return found

    def block(self, i: int) -> nn.Module:
        """Block i with the tensors that do not move."""
        if i not in self.kept:
            block = self.walker.load_block(i)
            if not self.keeps:
                return block
            self.kept[i] = block
        return self.kept[i]

    def divergence(self, samples: Tensor, learn: bool = False, progress: float = 0.0, seed: int = 0) -> float:
        """Mean KL divergence from the teacher, nats per token.

        Args:
            samples: int64 [s], which.
            learn: add its gradients to those of variables.
            progress: share of the training that is done, see `Movable.soften`.
            seed: of what a step that learns draws at random.
        """
        self.learning = learn
        for number, movable in enumerate(self.everything().values()):
            movable.soften(progress if learn else None, seed + number)
        x, fronts = self.embedded[samples].to(self.task.device), []
        for i in range(len(self.moving)):
            if learn:
                fronts.append(x)
            x = self.forward(i, x)
        loss, gradient = self.head(samples, x)
        if learn:
            for i in reversed(range(len(self.moving))):
                gradient = self.backward(i, fronts.pop(), gradient)
        return loss

    @torch.no_grad()
    def forward(self, i: int, x: Tensor) -> Tensor:
        """Block i's output, [s, T, H]."""
        block, weights = self.block(i), self.weights(i)
        layers, parts = self.walker.layers, self.walker.pieces(*x.shape[:2])

        @torch.no_grad()
        def run(part: slice) -> Tensor:
            return self.walker.differentiable(block, i, x[part], weights, layers)

        return torch.cat(side_by_side(run, parts, self.walker.shares(parts)))

    def backward(self, i: int, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient in front of block i, [s, T, H]; adds to gradients of its variables.

        Args:
            i: its index.
            x: its inputs.
            gradient: by its outputs.
        """
        block, moving, parts = self.block(i), self.moving[i], self.walker.pieces(*x.shape[:2])
        weights = {name: w.float().requires_grad_() for name, w in self.weights(i, back=True).items()}

        def run(part: slice) -> tuple[Tensor, ...]:
            front = x[part].detach().requires_grad_()
            y = self.walker.differentiable(block, i, front, weights, self.walker.layers)
            leaves = [front, *weights.values()]
            found = torch.autograd.grad(y, leaves, gradient[part].to(y.dtype), allow_unused=True)
            return tuple(torch.zeros_like(at) if g is None else g for at, g in zip(leaves, found, strict=True))

        fronts, *pulls = zip(*side_by_side(run, parts, self.walker.shares(parts)), strict=True)
        for movable, found in zip(moving.values(), pulls, strict=True):
            movable.pull(torch.stack(found).sum(0) if len(found) > 1 else found[0])
        return torch.cat(fronts)

    def head(self, samples: Tensor, x: Tensor) -> tuple[float, Tensor]:
        """(mean divergence; its gradient by hidden states behind the last block, [s, T, H])."""
        norm, _ = self.walker.output_layer()
        for movable in self.last.values():
            norm.get_parameter("module.weight").data = movable.value().to(self.task.dtype)
        losses, gradients, tokens = [], [], x.shape[0] * x.shape[1]
        for s, sample in enumerate(samples.tolist()):

            def error(logits: Tensor, positions: slice, sample: int = sample) -> Tensor:
                wanted = self.teacher.log_probabilities(sample, positions)
                found = logits.log_softmax(-1)
                p = wanted.exp()
                losses.append((p * (wanted - found)).sum() / tokens)
                return found.exp_().sub_(p).div_(tokens)

            front, own = head_gradient(self.walker, x[s : s + 1], error)
            gradients.append(front)
            for movable in self.last.values():
                movable.pull(own)
        return float(torch.stack(losses).double().sum()), torch.cat(gradients)


def states(movables: Mapping[str, Movable]) -> list[Tensor]:
    """Copies of all variables."""
    return [v.detach().clone() for movable in movables.values() for v in (*movable.variables(), *movable.decisive())]
