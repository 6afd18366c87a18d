"""Scales and norms learn to predict what the original model predicts; codes stay, or learn as well.

The loss is the mean KL divergence of the predicted tokens from those of the original model, over the whole vocabulary,
on the calibration's samples; some of them are held out, and the state that is best for these is kept, the start among
the candidates. Training nothing but scales behind frozen codes is the end-to-end phase of EfficientQAT
(https://arxiv.org/abs/2407.11062), with the original model's predictions instead of the text.

Where rounding is learned too, in one of the ways of `learned`, codes begin as they were found, and a weight takes 16
bytes while it goes on, with the optimizer's and those of the best state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from qtool.methods._base import split
from qtool.methods._optimizers import Adam
from qtool.methods.learned import Way
from qtool.plan.layers import Plan
from qtool.stages._base import Stage, StageResult, StageTask
from qtool.stages._movable import Movable, MovableCodes, MovableVector, Scales
from qtool.stages._student import Student, Teacher, states


class Distill(Stage):
    """Moves scales, free offsets and norms by the divergence of the whole model.

    Attributes:
        epochs: over the samples that are learned from.
        batch: samples of a step.
        rate: of the first step of Adam, relative to a scale, or to the mean magnitude of a norm; falls to 0.
        scales: whether scales and free offsets move.
        norms: whether norms do.
        rounding: how codes do, as in `learned`; None: they stay.
        rounding_rate: of the first step of Adam for what decides on codes; falls to 0.
        holdout: share of the samples that only decide which state is best.
    """

    epochs: int = Field(2, ge=1, le=1000)
    batch: int = Field(8, ge=1, le=4096)
    rate: float = Field(0.001, gt=0, le=0.1)
    scales: bool = True
    norms: bool = True
    rounding: Way | None = None
    rounding_rate: float = Field(0.02, gt=0, le=1)
    holdout: float = Field(0.125, gt=0, lt=1)

    def misfit(self, plan: Plan) -> str | None:
        """See `Stage.misfit`."""
        inside = [p.format for p in plan.layers if p.format and p.module.block is not None]
        if self.norms or (self.scales and any(fmt.group_rows == 1 for fmt in inside)):
            return None
        if self.rounding and any(fmt.codebook() is None for fmt in inside):
            return None
        return "nothing moves: let norms do (norms: true), or choose formats whose rows have scales of their own"

    def run(self, task: StageTask) -> StageResult:
        """See `Stage.run`."""
        assert task.tokens is not None  # see `needs_tokens`
        student = Student(
            task, Teacher(task.walker(task.original), task.tokens), self.scales, self.norms, self.rounding
        )
        seen, unseen = split(len(task.tokens), self.holdout, task.seed)
        moving = student.everything()
        start = least = student.divergence(unseen)
        best, epoch, learned = states(moving), 0, list[float]()
        course: list[tuple[int, float | None, float]] = [(0, None, start)]
        for losses in self.train(task, student, seen):
            learned.append(losses)
            divergence = student.divergence(unseen)
            course.append((len(learned), losses, divergence))
            task.progress(len(learned), self.epochs, f"divergence {losses:.4f}, held out {divergence:.4f}")
            if divergence < least:
                least, best, epoch = divergence, states(moving), len(learned)
        with torch.no_grad():
            for variable, value in zip(variables(moving), best, strict=True):
                variable.copy_(value)
        about = {"held out before": start, "held out": least, "best epoch": float(epoch)}
        about |= {"learned first": learned[0], "learned last": learned[-1]}
        found = result(moving, about) if epoch else StageResult(about=about)
        return replace(found, course=course)

    def train(self, task: StageTask, student: Student, seen: Tensor) -> Iterator[float]:
        """Mean divergence of each epoch, while it goes on."""
        moving = student.everything().values()
        kinds = [(v, self.rate) for m in moving for v in m.variables()]
        kinds += [(v, self.rounding_rate) for m in moving for v in m.decisive()]
        adam = Adam(kinds)
        generator = torch.Generator().manual_seed(task.seed)
        steps = -(-len(seen) // self.batch) * self.epochs
        done = 0
        for _ in range(self.epochs):
            order, total = seen[torch.randperm(len(seen), generator=generator)], 0.0
            for part in torch.split(order, self.batch):
                drawn = task.seed + done * len(moving)
                total += student.divergence(part, learn=True, progress=done / steps, seed=drawn) * len(part)
                adam.take(1 - done / steps)
                adam.zero_grad()
                done += 1
            yield total / len(seen)


def variables(moving: Mapping[str, Movable]) -> list[Tensor]:
    """All variables, in order."""
    return [v for movable in moving.values() for v in (*movable.variables(), *movable.decisive())]


def result(moving: Mapping[str, Movable], about: Mapping[str, float]) -> StageResult:
    """What moved, as files hold it."""
    params = {name: m.replaced() for name, m in moving.items() if isinstance(m, MovableCodes | Scales)}
    tensors = {
        f"{name}.weight": movable.value() for name, movable in moving.items() if isinstance(movable, MovableVector)
    }
    return StageResult(params, tensors, about)
