"""Learned rounding: a block's codes and scales are trained until its output is that of the original block.

Variables start where another method ended, so no step is needed to be as good as that one; the best state is kept by
samples that training never sees, the start among the candidates. What a step sees is the block as it will run: inputs
behind the quantized blocks before it, its own inputs rounded where the plan says so. The target is the output of the
original block on the original stream. After SignRound (https://arxiv.org/abs/2309.05516), for every grid, and from any
start.

- Each weight's variable is added to its place among the levels, in steps, before that is rounded (`_soft`); scales of
  groups, and offsets where they are free, may be trained along, relative to the start.
- `sign` moves every variable by the same amount a step, `rate` falling to zero on a line; `adam` is Adam, its rate too.
- Errors of a token count relative to that token's energy, because the norm behind the block divides by it; without that
  few tokens of huge hidden states would decide everything. Where a recipe weighs tokens by the gradient of the model's
  loss, errors count by that instead.

Shape letters: S samples, T tokens of a sample, H hidden size, N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats._base import Format, Params
from qtool.methods._base import BlockTask, Solution
from qtool.methods._block import BlockMethod
from qtool.methods._fixed import FixedRounding
from qtool.methods._soft import harden, soft_decode, soft_start

CHECKS = 8
"""How often the state is compared with the best one so far."""


@dataclass
class Variables:
    """What is trained of one module.

    Attributes:
        w: original weights, float32 [N, K].
        fmt, params: its format, and where its parameters began.
        v: added to places before rounding, float32 [N, K].
        factor: of each scale, float32 [N, G], from 1; None if scales stay.
        shift: of each offset, in scales, float32 [N, G], from 0; None if offsets stay.
        fixed: gives weights where scales and offsets stay.
    """

    w: Tensor
    fmt: Format
    params: Params
    v: Tensor
    factor: Tensor | None
    shift: Tensor | None
    fixed: FixedRounding | None

    @classmethod
    def of(cls, w: Tensor, start: Solution, scales: bool) -> Variables:
        """Those that begin with a solution."""
        fmt = start.quantized.format
        params = start.quantized.params
        scale, _ = fmt.affine(params)
        factor = torch.ones_like(scale).requires_grad_() if scales else None
        shift = torch.zeros_like(scale).requires_grad_() if scales and fmt.free_offset else None
        fixed = None if scales else FixedRounding(w, fmt, params)
        return cls(w, fmt, params, soft_start(w, start.quantized).requires_grad_(), factor, shift, fixed)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The wanted scale and offset, float32 [N, G]; None where they stay."""
        scale, offset = self.fmt.affine(self.params)
        return (
            None if self.factor is None else scale * self.factor,
            None if self.shift is None else offset + scale * self.shift,
        )

    def weights(self) -> Tensor:
        """As decoded, float32 [N, K], with gradients."""
        if self.fixed:
            return self.fixed(self.v)
        return soft_decode(self.w, self.v, self.fmt, self.params, *self.affine())

    def leaves(self) -> Iterator[tuple[Tensor, bool]]:
        """All that is trained, and whether it is a rounding variable."""
        yield self.v, True
        yield from ((p, False) for p in (self.factor, self.shift) if p is not None)


class Learned(BlockMethod):
    """Trains rounding, block by block.

    Attributes:
        steps: of training.
        batch: samples of a step.
        rate: of the first step, in steps between levels; None: 1 / steps, so that a weight can cross one level.
        scales: whether scales and free offsets are trained along.
        scale_rate: of the first step, relative to a scale.
        optimizer: see the module.
        trim: share of the largest errors that training leaves out.
        holdout: share of the samples that only decide which state is best.
    """

    steps: int = Field(200, ge=1, le=100_000)
    batch: int = Field(8, ge=1, le=4096)
    rate: float | None = Field(None, gt=0, le=1)
    scales: bool = False
    scale_rate: float = Field(0.001, gt=0, le=1)
    optimizer: Literal["sign", "adam"] = "sign"
    trim: float = Field(0.0, ge=0, lt=1)
    holdout: float = Field(0.125, gt=0, lt=1)

    def solve_block(self, task: BlockTask) -> dict[str, Solution]:
        """See `BlockMethod.solve_block`."""
        trained = {name: s for name, s in task.found.items() if s.quantized.format.codebook() is None}
        variables = {name: Variables.of(task.weights[name], s, self.scales) for name, s in trained.items()}
        if not variables:
            return {}
        seen, unseen = task.split(self.holdout)
        generator = torch.Generator().manual_seed(task.seed + task.block)
        step = self._stepper([leaf for x in variables.values() for leaf in x.leaves()])
        some = seen[: len(unseen)]
        start = held_out(task, decoded(trained), unseen)
        best, kept = start, dict[str, Solution]()
        for i in range(self.steps):
            part = seen[torch.randperm(len(seen), generator=generator)[: self.batch]]
            leave_gradients(task, variables, part, self.trim)
            step(1 - i / self.steps)
            if (i + 1) % max(1, self.steps // CHECKS) == 0 or i + 1 == self.steps:
                found = {name: harden(x.w, x.v, x.fmt, x.params, *x.affine()) for name, x in variables.items()}
                solutions = {name: Solution(q, trained[name].fallback) for name, q in found.items()}
                if (error := held_out(task, decoded(solutions), unseen)) < best:
                    best, kept = error, solutions
        losses = {"training before": held_out(task, decoded(trained), some)}
        losses["training after"] = held_out(task, decoded({**trained, **kept}), some)
        task.note(losses | {"held out before": start, "held out after": best})
        return kept

    def _stepper(self, leaves: list[tuple[Tensor, bool]]) -> Callable[[float], None]:
        """A function that takes a step, given the share of the first step's rate, and forgets gradients."""
        own = self.rate or 1 / self.steps
        rates = [(leaf, own if rounding else self.scale_rate) for leaf, rounding in leaves]
        groups = [{"params": [leaf], "lr": rate} for leaf, rate in rates]
        adam = torch.optim.Adam(groups) if self.optimizer == "adam" else None

        @torch.no_grad()
        def step(share: float) -> None:
            if adam:
                for group, (_, rate) in zip(adam.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                adam.step()
            for leaf, rate in rates:
                if not adam and leaf.grad is not None:
                    leaf.sub_(leaf.grad.sign_(), alpha=rate * share)
                leaf.grad = None

        return step


def decoded(solutions: Mapping[str, Solution]) -> dict[str, Tensor]:
    """Weights as codes alone decode, by module."""
    return {name: solution.quantized.decode() for name, solution in solutions.items()}


def relative_error(output: Tensor, target: Tensor, trim: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2.

    Args:
        output: [s, T, H].
        target: the same.
        trim: share of the largest terms that are left out.
        weights: how much each token's squared error counts, float32 [s, T]; the sum is relative to that of targets.
    """
    target = target.float()
    energy = target.square().sum(-1).clamp_min(1e-20)
    share = 1 / energy if weights is None else weights / (weights * energy).mean()
    errors = (output.float() - target).square() * share[..., None]
    if trim:
        keep = errors.numel() - int(trim * errors.numel())
        limit = errors.detach().flatten().kthvalue(keep).values
        errors = torch.where(errors <= limit, errors, 0.0)
    mean: Tensor = errors.sum(-1).mean()
    return mean


def block_error(task: BlockTask, weights: Mapping[str, Tensor], part: Tensor, trim: float = 0.0) -> Tensor:
    """Relative error of the block with these weights on some samples."""
    share = None if task.token_weights is None else task.token_weights[part].to(task.device)
    return relative_error(task.run(part, weights), task.targets[part].to(task.device), trim, share)


def leave_gradients(task: BlockTask, variables: Mapping[str, Variables], part: Tensor, trim: float) -> None:
    """Adds gradients of the block's error on some samples to variables; what leads to them is gone afterwards."""
    weights = {name: x.weights() for name, x in variables.items()}
    block_error(task, weights, part, trim).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def held_out(task: BlockTask, weights: Mapping[str, Tensor], part: Tensor) -> float:
    """Relative error of the block with these weights on some samples, one after the other."""
    weights = {name: w.to(task.device) for name, w in weights.items()}
    errors = [block_error(task, weights, s[None]) for s in part]
    return float(torch.stack(errors).double().mean())
