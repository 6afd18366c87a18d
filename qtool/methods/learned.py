"""Learned rounding: a block's codes and scales are trained until its output is that of the original block.

Variables start where another method ended, so no step is needed to be as good as that one; the best state is kept by
samples that training never sees, the start among the candidates. What a step sees is the block as it will run: inputs
behind the quantized blocks before it, its own inputs rounded where the plan says so. After SignRound
(https://arxiv.org/abs/2309.05516), for every grid, and from any start and other variables.

- The target is the output of the original block on the original stream, or on the inputs that the block has now.
- `sign` moves every variable by the same amount a step; `lion` by the sign of a mean over steps
  (https://arxiv.org/abs/2302.06675); `adam` is Adam. Rates fall to zero, on a line or on a cosine.
- Errors of a token count relative to that token's energy, because the norm behind the block divides by it; without that
  few tokens of huge hidden states would decide everything. Where a recipe weighs tokens by the gradient of the model's
  loss, errors count by that instead; `plain` ones count as they are.

Shape letters: S samples, s of them, T tokens of a sample, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.methods._base import BlockTask, Part, Solution
from qtool.methods._block import BlockMethod
from qtool.methods._joined import TrainedRows, joined
from qtool.methods._mixtures import Gumbel, Sigmoid
from qtool.methods._optimizers import Optimizer, optimizer
from qtool.methods._relaxed import Divided, DividedLowRank, Relaxed, ShiftedPlaces, ShiftedWeights, Unmoved
from qtool.methods._repeated import Repeated
from qtool.numerics.checks import checked_later

Way = Literal["steps", "weights", "divide", "low-rank", "sigmoid", "gumbel", "none"]
WAYS: dict[Way, type[Relaxed]] = {
    "steps": ShiftedPlaces,
    "weights": ShiftedWeights,
    "divide": Divided,
    "low-rank": DividedLowRank,
    "sigmoid": Sigmoid,
    "gumbel": Gumbel,
    "none": Unmoved,
}
"""What can be trained of rounding."""

CHECKS = 8
"""How often the state is compared with the best one so far."""

PIECE = 4096
"""Tokens of which a block's intermediates are in memory at a time, where errors of tokens do not depend on others."""


class Learned(BlockMethod):
    """Trains rounding, block by block.

    Attributes:
        rounding: what of it is trained: `steps` that are added to places (AutoRound), `weights` (EfficientQAT), what
            weights are divided by (`divide`: FlexRound; `low-rank`: LRQ), mixtures of two levels (`sigmoid`: AdaRound;
            `gumbel`: GSQ), or `none`, so that only scales move and clip (OmniQuant).
        steps: of training.
        batch: samples of a step.
        rate: of the first step, for rounding; None: 1 / steps, so that a weight can cross one level.
        scales: whether scales and free offsets are trained along.
        scale_rate: of the first step, relative to a scale.
        optimizer, schedule, target, loss: see the module.
        penalty: of `sigmoid`: what undecided weights cost, in errors of the start.
        trim: share of the largest errors that training leaves out.
        holdout: share of the samples that only decide which state is best.
        patience: of the eight times that the state is compared, how often in a row nothing may be won before training
            ends; None: it never does before its last step, since most is won late, where rates are small.
    """

    rounding: Way = "steps"
    steps: int = Field(200, ge=1, le=100_000)
    batch: int = Field(8, ge=1, le=4096)
    rate: float | None = Field(None, gt=0, le=1)
    scales: bool = False
    scale_rate: float = Field(0.001, gt=0, le=1)
    optimizer: Optimizer = "sign"
    schedule: Literal["line", "cosine"] = "line"
    target: Literal["original", "present"] = "original"
    loss: Literal["relative", "plain"] = "relative"
    penalty: float = Field(1.0, ge=0)
    trim: float = Field(0.0, ge=0, lt=1)
    holdout: float = Field(0.125, gt=0, lt=1)
    patience: int | None = Field(None, ge=1)

    def solve_block(self, task: BlockTask) -> dict[str, Solution]:
        """See `BlockMethod.solve_block`."""
        trained = {name: s for name, s in task.found.items() if s.quantized.format.codebook() is None}
        drawn = torch.Generator(task.device).manual_seed(task.seed + task.block)
        if not trained:
            return {}
        variables = joined(WAYS[self.rounding], task.weights, trained, self.scales, drawn)
        seen, unseen = task.split(self.holdout)
        errors, generator = Errors(task, self), torch.Generator().manual_seed(task.seed + task.block)
        own = self.rate or 1 / self.steps
        steps = [
            optimizer(self.optimizer, [(leaf, own if decides else self.scale_rate) for leaf, decides in leaves])
            for leaves in (several.relaxed.leaves() for several in variables)
        ]
        some = seen[: -(-len(unseen) // 2)]  # enough to tell, at half of the time
        course = [(0, *errors.both(trained, some, unseen))]
        start = best = course[0][2]
        gradients = Gradients(errors, variables, self.penalty * start)
        kept, idle, end = dict[str, Solution](), 0, course[0]
        for i in range(self.steps):
            part = seen[torch.randperm(len(seen), generator=generator)[: self.batch]]
            gradients(part, i / self.steps, [partial(step, self.share(i / self.steps)) for step in steps])
            if (i + 1) % max(1, self.steps // CHECKS) == 0 or i + 1 == self.steps:
                ends = {name: quantized for several in variables for name, quantized in several.solutions().items()}
                solutions = {name: Solution(ends[name], start.fallback) for name, start in trained.items()}
                course.append((i + 1, *errors.both(solutions, some, unseen)))
                idle += 1
                if course[-1][2] < best:
                    best, kept, idle, end = course[-1][2], solutions, 0, course[-1]
                if idle == self.patience:
                    break
        losses = {"training before": course[0][1], "training after": end[1]}
        task.note(losses | {"held out before": start, "held out after": best}, course)
        return kept

    def share(self, progress: float) -> float:
        """Share of the first step's rate."""
        return 1 - progress if self.schedule == "line" else 0.5 * (1 + math.cos(math.pi * progress))


class Errors:
    """How far a block's outputs are from their targets.

    Args:
        task: the block.
        method: says what counts.
    """

    def __init__(self, task: BlockTask, method: Learned) -> None:
        self.task, self.method = task, method

    def targets(self, part: Part) -> Tensor:
        """[s, T, H], on the device."""
        if self.method.target == "original":
            return self.task.targets[part].to(self.task.device)
        with torch.no_grad():
            return self.task.run(part, self.task.weights, dict.fromkeys(self.task.weights, ()))

    def weights(self, part: Part, target: Tensor) -> Tensor | None:
        """How much tokens count, float32 [s, T]; None: see `relative_error`."""
        if self.task.token_weights is not None:
            return self.task.token_weights[part].to(self.task.device)
        return torch.ones_like(target[..., 0], dtype=torch.float32) if self.method.loss == "plain" else None

    def given(self, part: Part) -> tuple[Tensor, ...]:
        """(hidden states in front of the block, [s, T, H]; its targets; how much tokens count, if not all alike)."""
        target = self.targets(part)
        counts = self.weights(part, target)
        x = self.task.inputs[part].to(self.task.device, self.task.dtype)
        return (x, target) if counts is None else (x, target, counts)

    def __call__(self, weights: Mapping[str, Tensor], given: tuple[Tensor, ...], trim: float = 0.0) -> Tensor:
        """Mean error of the block with these weights on some samples, see `given`."""
        x, target, *counts = given
        return relative_error(self.task.output(x, weights), target, trim, counts[0] if counts else None)

    @property
    def apart(self) -> bool:
        """Whether the error of a sample is the same, whatever others it is asked for with."""
        return self.task.token_weights is None and self.method.loss == "relative" and not self.method.trim

    def pieces(self, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Samples, as `given` has them, in as many pieces as memory for intermediates wants."""
        step = max(1, PIECE // given[0].shape[1]) if self.apart else len(given[0])
        return list(zip(*(torch.split(t, step) for t in given), strict=True))

    def dtype(self, name: str) -> torch.dtype:
        """What weights of a module are rounded to before anything is done with them."""
        return torch.float32 if self.task.found[name].residuals else self.task.dtype

    @torch.no_grad()
    def held_out(self, weights: Mapping[str, Tensor], part: Tensor) -> float:
        """The same with nothing left out, of as many samples at a time as do not weigh each other's tokens."""
        weights = {name: w.to(self.task.device) for name, w in weights.items()}
        several = self.task.device.type != "cpu" and self.task.token_weights is None and self.method.loss == "relative"
        parts = torch.split(part, max(1, PIECE // self.task.inputs[part[:1]].shape[1]) if several else 1)
        errors = torch.stack([self(weights, self.given(s)) for s in parts]).double().cpu()
        return float((errors * torch.tensor([len(s) for s in parts])).sum() / len(part))

    def both(self, solutions: Mapping[str, Solution], seen: Tensor, unseen: Tensor) -> tuple[float, float]:
        """The same of codes, on samples of the training and on those held out."""
        weights = decoded(solutions)
        return self.held_out(weights, seen), self.held_out(weights, unseen)


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


class Gradients:
    """Adds gradients of a block's error to variables; what leads to them is gone afterwards.

    Weights are computed once a step, however many pieces its samples come in; gradients by them add up. Steps are taken
    one by one, so that no more gradients by variables are in memory than one of them wants; where a device repeats
    what it recorded, behind all of them.

    Args:
        errors: of the block.
        variables: what is trained.
        penalty: what a penalty of 1 counts.
    """

    def __init__(self, errors: Errors, variables: Sequence[TrainedRows], penalty: float) -> None:
        self.errors, self.variables, self.penalty, self.progress = errors, variables, penalty, 0.0
        for several in variables:
            wanted = {errors.dtype(name) for name in several.starts}
            several.relaxed.dtype = wanted.pop() if len(wanted) == 1 else torch.float32
        leaves = [leaf for several in variables for leaf, _ in several.relaxed.leaves()]
        self.alike = all(several.relaxed.repeats and several.small for several in variables) and not errors.method.trim
        self.repeated = Repeated(leaves, self.alike)
        self.steps: Sequence[Callable[[], None]] = ()

    def __call__(self, part: Tensor, progress: float, steps: Sequence[Callable[[], None]]) -> None:
        """Of some samples, when so much of the training is done; then takes the steps, one for each of `variables`."""
        self.progress, self.steps = progress, () if self.alike else steps
        self.repeated(self.leave, *self.errors.given(part))
        for step in steps if self.alike else ():
            step()

    def leave(self, *given: Tensor) -> None:
        """See the class; of samples as `Errors.given` has them."""
        errors, pieces = self.errors, self.errors.pieces(given)
        soft = [self.computed(several) for several in self.variables]
        leaves = {name: w.detach().requires_grad_() for own in soft for name, w in own.items()}
        for piece in pieces:
            loss = errors(leaves, piece, errors.method.trim)
            torch.autograd.backward(loss if len(pieces) == 1 else loss * (len(piece[0]) / len(given[0])))
        for number, several in enumerate(self.variables):
            own = soft[number]
            ends = [(w, leaves.pop(name).grad) for name, w in own.items()]
            ends = [(w, gradient) for w, gradient in ends if gradient is not None]
            if (penalty := several.relaxed.penalty(self.progress)) is not None:
                ends.append((self.penalty * (penalty / len(self.variables)), None))
            torch.autograd.backward([w for w, _ in ends], [gradient for _, gradient in ends])
            if self.steps:
                self.steps[number]()

    def computed(self, several: TrainedRows) -> dict[str, Tensor]:
        """Weights as this step has them, by module, in the type that blocks compute in."""
        with checked_later():  # solutions are
            return {name: w.to(self.errors.dtype(name)) for name, w in several.weights(self.progress).items()}
