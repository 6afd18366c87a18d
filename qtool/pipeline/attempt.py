"""Candidates of transforms, of which every decoder block, or the model as a whole, takes the best.

Shape letters: S samples, T tokens, H hidden size, K inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.edits import STREAM, Edit
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import CheckpointError
from qtool.methods._base import split
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.learning import carried_out
from qtool.pipeline.prepare import Job
from qtool.pipeline.roughly import Roughly, Statics
from qtool.pipeline.solver import with_static
from qtool.pipeline.trial import Trials
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.values import Values
from qtool.transforms._base import Candidates, Transform


class Attempt:
    """Candidates at the model of a run.

    Args:
        job: the run.
        tried: the candidates.
        before: what transforms before them did.
        listener: called with events of progress.

    Attributes:
        notes: what was chosen, for the report.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, job: Job, tried: Candidates, before: Sequence[Edit], listener: Listener) -> None:
        self.job, self.tried, self.before, self.listener = job, tried, tuple(before), listener
        self.count = job.original.family.blocks(job.original.config)

    def edits(self, tokens: Tensor) -> Iterator[Edit]:
        """What the best candidate of each block does there.

        Raises:
            CheckpointError: there is one sample, and none to judge by.
        """
        if len(tokens) < 2:
            hint = "raise calibration.samples"
            raise CheckpointError("one calibration sample is none to learn from and one to judge by", hint=hint)
        parts = split(len(tokens), self.tried.held_out, self.job.plan.recipe.calibration.seed)
        learn, judge = (tokens[part] for part in parts)
        made = [self.candidate((), learn), *(self.candidate(transforms, learn) for transforms in self.tried.each)]
        yield from self.of_blocks(made, learn, judge) if self.tried.by == "block" else self.of_model(made, learn, judge)

    def of_blocks(self, made: Sequence[tuple[Edit, ...]], learn: Tensor, judge: Tensor) -> Iterator[Edit]:
        """Of some lists of edits, those that are best in each block."""
        errors = [self.errors(edits, learn, judge) for edits in made]
        best = [min(range(len(errors)), key=lambda c: errors[c][i]) for i in range(self.count)]
        sorted_out = [self.by_block(edits) for edits in made]
        self.notes = (self.said(best, errors),)
        for i, choice in enumerate(best):
            yield from sorted_out[choice][i]

    def of_model(self, made: Sequence[tuple[Edit, ...]], learn: Tensor, judge: Tensor) -> tuple[Edit, ...]:
        """Of some lists of edits, that whose rounded model diverges least from the original."""
        trials, found = Trials(self.job.original, judge, self.job.device), list[float]()
        for name, edits in zip(self.names, made, strict=True):
            model = Rewritten(self.job.original, (*self.before, *edits), dtype=torch.float32)
            layers = with_ops(self.job.plan.layers, model)
            job = replace(self.job, checkpoint=model, plan=replace(self.job.plan, layers=layers))
            found.append(trials.of(Roughly(job, *self.measured(job, learn))).mean)
            self.listener(Event("transform", len(found), len(made), f"try {name}", {"nats": found[-1]}))
        best = min(range(len(found)), key=found.__getitem__)
        diverges = f"rounded to nearest it diverges by {found[best]:.4g} nats per token, {found[0]:.4g} with nothing"
        self.notes = (f"try: {self.names[best]} for the whole model; {diverges}",)
        return made[best]

    @property
    def names(self) -> list[str]:
        """Of the candidates, nothing first."""
        return ["nothing", *(" + ".join(map(spelled, transforms)) for transforms in self.tried.each)]

    def candidate(self, transforms: Sequence[Transform], tokens: Tensor) -> tuple[Edit, ...]:
        """What some transforms do to the whole model, one behind the other.

        Where a candidate turns hidden states, all of them give the output layer a matrix of its own, as was planned.
        """
        found: tuple[Edit, ...] = ()
        turns = any(STREAM in t.kinds for others in self.tried.each for t in others)
        if turns and self.job.original.tied and not any(STREAM in t.kinds for t in transforms):
            edges = self.job.original.family.edges(self.job.original.config, None)
            found = tuple(Edit(edge.name) for edge in edges if edge.kind == "norm")
        for transform in transforms:
            found += tuple(carried_out(self.job, transform, (*self.before, *found), self.listener).edits(tokens))
        return found

    def by_block(self, edits: Sequence[Edit]) -> dict[int, list[Edit]]:
        """Edits by the block that they are in; those behind the last one are left out."""
        family, config = self.job.original.family, self.job.original.config
        places = {edge.name: i for i in range(self.count) for edge in family.edges(config, i)}
        places |= {p.module.name: p.module.block for p in self.job.plan.layers if p.module.block is not None}
        found: dict[int, list[Edit]] = {i: [] for i in range(self.count)}
        for edit in edits:
            block = places.get(edit.edge or edit.modules[0])
            if block is not None:
                found[block].append(edit)
        return found

    def errors(self, edits: Sequence[Edit], learn: Tensor, judge: Tensor) -> list[float]:
        """Squared error of each rounded block's output behind some edits, relative to the output's squares.

        Args:
            edits: of a candidate.
            learn: int64 [S, T], that rounding may look at.
            judge: int64 [S, T], that blocks are compared on.
        """
        exact = Rewritten(self.job.original, self.before, dtype=torch.float32)
        model = Rewritten(self.job.original, (*self.before, *edits), dtype=torch.float32)
        plans = self.job.plan.layers
        inside = [p if p.module.block is not None else replace(p, format=None) for p in plans]
        job = replace(self.job, checkpoint=model, plan=replace(self.job.plan, layers=with_ops(inside, model)))
        rounded, walker = self.walker(Roughly(job, *self.measured(job, learn))), self.walker(exact)
        hidden, found = walker.embed(judge), list[float]()
        for i in range(self.count):
            (tried := hidden.like()).values.copy_(hidden.values)
            rounded.advance(rounded.load_block(i), i, tried)
            walker.advance(walker.load_block(i), i, hidden)
            apart = (tried.values.float() - hidden.values.float()).square().sum(dtype=torch.float64)
            found.append(float(apart / hidden.values.float().square().sum(dtype=torch.float64)))
        return found

    def measured(self, job: Job, tokens: Tensor) -> tuple[Mapping[str, Tensor], Statics]:
        """What rounding looks at: importances of channels, and scales of inputs where all tokens share them."""
        plans = {p.module.name: p for p in job.plan.layers if p.format}
        static = {name for name, p in plans.items() if p.activations and p.activations.static}
        if not static and not any(p.weight_needs for p in plans.values()):
            return {}, {}
        importance, statics = dict[str, Tensor](), Statics()
        walker, needs = self.walker(job.checkpoint), frozenset({Channels, Values} if static else {Channels})
        hidden = walker.embed(tokens)
        for i in range(self.count):
            stats = walker.collect(walker.load_block(i), i, hidden, needs)
            self.note(importance, statics, [plans[m.name] for m in walker.modules[i] if m.name in plans], stats)
        original = job.original
        head = plans.get(original.family.embedding if original.tied else original.family.head)
        if head and head.needs:
            self.note(importance, statics, [head], {head.module.reads: walker.collect_head(hidden, needs)})
        return importance, statics

    @staticmethod
    def note(
        importance: dict[str, Tensor], statics: Statics, plans: Sequence[LayerPlan], stats: Mapping[str, InputStats]
    ) -> None:
        """Takes down what was measured on inputs of some layers."""
        for p in plans:
            seen = stats[p.module.reads]
            if p.weight_needs and seen.tokens:
                importance[p.module.reads] = seen[Channels].importance.cpu()
            if p.activations and p.activations.static and (found := with_static(p, seen).static):
                statics.setdefault(p.module.name, {})[p.activations.label] = found

    def walker(self, model: Checkpoint) -> Walker:
        """What runs a model, every process for itself: blocks are compared on few samples."""
        everything = self.job.plan.recipe.calibration.experts == "all"
        return Walker(model, self.job.device, self.job.dtype, everything)

    def said(self, best: Sequence[int], errors: Sequence[Sequence[float]]) -> str:
        """What was chosen how often, and what that leaves of the error on the samples that judge."""
        names = self.names
        for i, c in enumerate(best):
            found = {name: errors[k][i] for k, name in enumerate(names)}
            self.listener(Event("transform", i + 1, self.count, f"block {i}: {names[c]}", found))
        chosen = ", ".join(f"{names[c]} in {n}" for c, n in sorted(Counter(best).items()))
        left = sum(errors[c][i] for i, c in enumerate(best)) / max(sum(errors[0]), 1e-30)
        return f"try: of {self.count} blocks, {chosen}; {left:.2f} of the error of rounded blocks is left"


def with_ops(plans: Sequence[LayerPlan], model: Checkpoint) -> tuple[LayerPlan, ...]:
    """Plans with what a rewritten model wants to be done to inputs of the layers that are rounded."""
    return tuple(replace(p, input_ops=model.input_ops.get(p.module.name, ())) if p.format else p for p in plans)


def spelled(transform: Transform) -> str:
    """A transform with the options that were chosen for it: "smooth alpha=0.6"."""
    chosen = transform.model_dump(mode="json", exclude_defaults=True)
    return " ".join((transform.name(), *(f"{key}={value}" for key, value in chosen.items())))
