"""How much the loss cares about each output of each linear layer: squared gradients, token by token.

The loss is that of the model's own guesses: targets are drawn from what it predicts, so that the mean of squared
gradients is the diagonal of the Fisher information, and half of that, times squared errors, the KL divergence that the
errors cause, to second order (https://arxiv.org/abs/2505.07004 weighs rounding errors so). Errors of different outputs
and tokens are taken to have nothing to do with each other.

Hidden states in front of all blocks are kept, and the way back is gone block by block, so that memory holds the weights
of one block only.

Shape letters: S samples, T tokens of one, R tokens that a module reads, K inputs, N outputs, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.calibrate.blocks import TABLE_VALUES
from qtool.calibrate.foreign import run_block
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.numerics.checks import finite
from qtool.numerics.product import float32_product

POSITIONS = 256
"""Whose logits are in memory at a time."""


class LayerRecord(NamedTuple):
    """What a module reads, and how much the loss cares about what it makes of that.

    Attributes:
        x: [R, K].
        squares: squared gradients of the summed loss, [R, N].
    """

    x: Tensor
    squares: Tensor


class Slopes:
    """One way forth and back through a model.

    Args:
        walker: over the model.
        tokens: int64 [S, T].
        seed: of the targets that are drawn.

    Attributes:
        behind: hidden states behind the last block.
        head: the output layer; knows what it reads once `blocks` is begun.
        embedded: squared gradients of hidden states before the first block, [S, T, H]; once `blocks` is through.
    """

    def __init__(self, walker: Walker, tokens: Tensor, seed: int) -> None:
        self.walker, self.seed = walker, seed
        hidden = walker.embed(tokens)
        self.fronts: list[Hidden] = []
        for i in range(len(walker.blocks)):
            self.fronts.append(hidden)
            after = hidden.like()
            after.values.copy_(hidden.values)
            walker.advance(walker.load_block(i), i, after)
            hidden = after
        self.behind, self.head = hidden, HeadSlopes(walker)
        self.embedded: Tensor | None = None

    def blocks(self) -> Iterator[tuple[int, dict[str, LayerRecord]]]:
        """From the last block to the first: what its modules read and how much that matters, by name.

        Experts that no token went to are missing.

        Raises:
            NumericsError: logits or gradients are not finite.
        """
        slopes = self._start()
        for i in reversed(range(len(self.fronts))):
            seen: dict[str, list[LayerRecord]] = defaultdict(list)
            block, front = self.walker.load_block(i), self.fronts.pop()
            for part in self.walker.parts(front):
                slopes[part] = self._back(block, i, front[part], slopes[part], seen)
            finite(slopes, f"gradients in front of block {i} of {self.walker.checkpoint.source}")
            yield i, {name: LayerRecord(*map(torch.cat, zip(*parts, strict=True))) for name, parts in seen.items()}
        self.embedded = slopes.square()

    def _back(self, block: nn.Module, i: int, x: Tensor, slope: Tensor, seen: dict[str, list[LayerRecord]]) -> Tensor:
        """Gradients in front of a block for those behind it, [s, T, H]; notes what goes by its modules."""

        def note(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                read = inputs[0].detach().flatten(0, -2)

                def keep(slope: Tensor) -> None:
                    seen[name].append(LayerRecord(read, slope.detach().flatten(0, -2).square()))

                output.register_hook(keep)  # type: ignore[no-untyped-call]

            return hook

        hooks = [
            self.walker.linear(block, m).register_forward_hook(note(m.name))
            for m in self.walker.modules[i]
            if m.kind == "linear"
        ]
        try:
            with torch.enable_grad():
                x = x.to(self.walker.device).clone().requires_grad_()
                arguments = self.walker.block_arguments(x.shape[1])[i]
                output = run_block(block, x, arguments, None)
                (found,) = torch.autograd.grad(output, x, slope.to(output))
        finally:
            for hook in hooks:
                hook.remove()
        return found.to(slope)

    def _start(self) -> Tensor:
        """Gradients behind the last block, of minus the log-probability of drawn targets: [S, T, H]."""
        draw, head = torch.Generator().manual_seed(self.seed), self.head
        slopes = torch.empty_like(self.behind.values)
        for s in range(self.behind.samples):
            for start in range(0, self.behind.length, POSITIONS):
                part = slice(start, start + POSITIONS)
                with torch.enable_grad():
                    x = self.behind[s : s + 1][0, part].to(self.walker.device).clone().requires_grad_()
                    read = head.norm(x)
                    z, bend = head.capped(float32_product(read.detach(), head.weight, TABLE_VALUES))
                    p = finite(z, f"logits of {self.walker.checkpoint.source}").softmax(1)
                    head.care += read.detach().float().square().sum(1) @ squares_of(p, bend)
                    target = torch.multinomial(p.cpu(), 1, generator=draw).to(z.device)
                    slope = p.scatter_add_(1, target, -torch.ones_like(target, dtype=p.dtype)).mul_(bend)
                    (found,) = torch.autograd.grad(read, x, head.back(slope).to(read.dtype))
                slopes[s, part] = found.to(slopes)
                head.note(read.detach(), z.logsumexp(1))
        return slopes


class HeadSlopes:
    """The output layer: what it reads, and how much the loss cares about each logit.

    Args:
        walker: over the model.

    Attributes:
        norm: in front of it.
        weight: [V, H].
        care: squared gradients of each logit, times squares of what is read, summed: float32 [V].
    """

    def __init__(self, walker: Walker) -> None:
        checkpoint, family = walker.checkpoint, walker.family
        self.norm = walker.load_norm()
        self.weight = walker.tensor(f"{family.embedding if checkpoint.tied else family.head}.weight")
        self.cap = family.logit_softcap(checkpoint.config)
        self.care = torch.zeros(len(self.weight), device=self.weight.device)
        self.read: list[Tensor] = []
        self.sums: list[Tensor] = []

    def capped(self, raw: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits, and their derivative by what the product gives."""
        if self.cap is None:
            return raw, 1.0
        bent = (raw / self.cap).tanh()
        return bent * self.cap, 1 - bent.square()

    def back(self, slope: Tensor) -> Tensor:
        """Gradients in front of the product for those behind it: float32 [R, V] -> [R, H]."""
        return slope.to(self.weight.dtype) @ self.weight

    def inputs(self) -> Tensor:
        """What all positions read, [R, H]."""
        return torch.cat(self.read)

    def note(self, read: Tensor, sums: Tensor) -> None:
        """Keeps what some positions read, [R, H], and the logarithms of their sums of exponentials, [R]."""
        self.read.append(read)
        self.sums.append(sums)

    def seen(self, rows: Tensor) -> LayerRecord:
        """Of some rows, int64 [N]; squares are expected ones, p (1 - p), rather than those of drawn targets."""
        x, sums = self.inputs(), torch.cat(self.sums)
        z, bend = self.capped(float32_product(x, self.weight[rows.to(self.weight.device)], TABLE_VALUES))
        return LayerRecord(x, squares_of((z - sums[:, None]).exp_(), bend))


def squares_of(p: Tensor, bend: Tensor | float) -> Tensor:
    """Expected squared gradients of -log p of a token that is drawn, by what the product gives: [R, V]."""
    return p * (1 - p) * (bend * bend)
