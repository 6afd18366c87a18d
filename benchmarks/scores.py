"""Ways to find out which layer gets which format, at the size of one mix: by costs, by evolution, by a policy.

Costs are by four formulas. Evolution knows none: it changes some decisions of the best plan so far at random, mends the
size, measures the divergence, and keeps what is better, from the mix on and from the plan of least cost on. A policy
(`benchmarks.policy`) measures as many plans, with and without practice on costs. What each way comes to is measured on
samples that none of them has seen, rounded to nearest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks import policy
from benchmarks.mixes import calibrated_on
from qtool.allocate.fit import Chosen
from qtool.allocate.losses import LOSSES
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.events import silent
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import Job, prepare
from qtool.pipeline.roughly import Roughly
from qtool.pipeline.sensitivity import Priced
from qtool.pipeline.swaps import swapped
from qtool.pipeline.trial import Trials

MIX = "gguf-q3_k_m"
SAMPLES, LENGTH, HELD_OUT = 32, 128, 16
SCORED = 8
"""Samples that costs are learned from."""
CHANGES = 4
"""Decisions that evolution changes at a time, at most."""


class Line(NamedTuple):
    """A way: nats per token on unseen samples, and plans that it measured."""

    way: str
    kld: float
    error: float
    measured: int

    def __str__(self) -> str:
        return f"{self.way:24} {self.kld:9.4f} ± {self.error:.4f} {self.measured:5}"


HEADER = f"{'way':24} {'KLD':>9} {'':8} {'plans':>5}"


class Remembering(Allocator):
    """One that rounds each matrix to each format once, however many plans it measures.

    Args:
        job, card: see `Allocator`.
        rounded: matrices by name and label.
    """

    def __init__(self, job: Job, card: Mapping[str, Any], rounded: dict[tuple[str, str], Tensor]) -> None:
        super().__init__(job, card)
        self.matrices = rounded

    def rounded(self, chosen: Chosen) -> Roughly:
        """See `Allocator.rounded`."""
        assert self.scores.found is not None
        return Remembered(replace(self.job, plan=self.plan(chosen)), self.scores.found, self.matrices)


class Remembered(Roughly):
    """What it makes of its matrices."""

    def __init__(self, job: Job, found: Priced, matrices: dict[tuple[str, str], Tensor]) -> None:
        super().__init__(job, *found.known)
        self.matrices = matrices

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        plan = self.plans.get(name.removesuffix(".weight"))
        if plan is None:
            return super().tensor(name)
        if (key := (name, plan.label)) not in self.matrices:
            self.matrices[key] = super().tensor(name)
        return self.matrices[key]


class Bench:
    """One model, all of it rounded to nearest, and the unseen half of its held-out samples.

    Args:
        model: folder.
        calibration: a recipe's calibration.data.
        device: where.
    """

    def __init__(self, model: Path, calibration: str, device: str) -> None:
        flags = calibrated_on(calibration, SAMPLES, LENGTH)[1::2]
        fixed = (
            *flags,
            f"budget.like={MIX}",
            f"budget.against=[{MIX}]",
            f"budget.held_out={HELD_OUT}",
            f"budget.samples={SCORED}",
            "method=rtn",
            "layers=[{match: '*', weights: q4_k}]",
        )
        self.job = prepare(str(model), "gguf-fit", fixed, device=device)
        self.samples, tokens = tokens_for(self.job)
        self.seen, unseen = tokens.chunk(2)
        self.judge = Trials(self.job.checkpoint, unseen, self.job.device)
        self.work, self.rounded = model.parent, dict[tuple[str, str], Tensor]()

    def allocator(self, loss: str) -> Allocator:
        """With costs by a formula."""
        recipe = self.job.plan.recipe
        assert recipe.budget is not None
        budget = recipe.budget.model_copy(update={"scores": loss})
        plan = replace(self.job.plan, recipe=recipe.model_copy(update={"budget": budget}))
        found = Remembering(replace(self.job, plan=plan), {"base_model": "wide", "recipe_name": MIX}, self.rounded)
        found.refuse_too_small()
        found.score(self.samples, self.seen, self.work / f"ways-{loss}.scores", False, "", silent)
        return found

    def line(self, way: str, of: Allocator, chosen: Chosen) -> Line:
        """What a way came to."""
        kld = self.judge.of(of.rounded(chosen))
        return Line(way, kld.mean, kld.error, len(of.tried))


def ways(model: Path, calibration: str, device: str, generations: int) -> Iterator[Line]:
    """Every way in turn, the mix itself first."""
    bench = Bench(model, calibration, device)
    for loss in LOSSES:
        of = bench.allocator(loss)
        assert of.limit is not None
        if loss == "second-order":
            best = of
            yield bench.line(MIX, of, dict(of.uniforms())[MIX])
        yield bench.line(loss, of, of.fitting(of.limit))
    assert best.limit is not None
    yield bench.line("second-order, swaps", best, swapped(best, best.fitting(best.limit), best.limit))
    for way, start in (
        ("evolution", dict(best.uniforms())[MIX]),
        ("second-order, evolution", best.fitting(best.limit)),
    ):
        best.tried.clear()
        yield bench.line(way, best, evolved(best, start, generations))
    for way, practice in (("policy", 0), ("second-order, policy", policy.PRACTICE)):
        best.tried.clear()
        yield bench.line(way, best, policy.learned(best, generations, practice))


def evolved(of: Allocator, chosen: Chosen, generations: int) -> Chosen:
    """The best plan that random changes and as many measurements come to, from some plan on."""
    draw, best = random.Random(0), of.measure(chosen).mean
    for _ in range(generations):
        child = changed(of, chosen, draw)
        if (kld := of.measure(child).mean) < best:
            chosen, best = child, kld
    return chosen


def changed(of: Allocator, chosen: Chosen, draw: random.Random) -> Chosen:
    """A plan with some decisions of another's made anew, that still fits."""
    assert of.limit is not None
    child = list(chosen)
    for i in draw.sample(range(len(child)), draw.randint(2, CHANGES)):
        child[i] = draw.randrange(len(of.groups[i].sizes))
    while of.size(tuple(child)) > of.limit:
        i = draw.randrange(len(child))
        sizes = of.groups[i].sizes.tolist()
        if smaller := [size for size in sizes if size < sizes[child[i]]]:
            child[i] = sizes.index(max(smaller))
    return tuple(child)
