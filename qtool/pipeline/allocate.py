"""Divides a recipe's budget: scores every option once, solves, and measures whether that beats uniform plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool import __version__
from qtool.allocate.decisions import Decision, applied, decisions, file_sizes, picked, uniform
from qtool.allocate.fit import Chosen, fit, matrices
from qtool.allocate.knapsack import Group, least_cost, total
from qtool.checkpoint._base import modules
from qtool.errors import PlanError
from qtool.formats._base import Format
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import Job
from qtool.pipeline.roughly import Roughly
from qtool.pipeline.scores import ScoreFile, scores_at
from qtool.pipeline.sensitivity import Pricing
from qtool.pipeline.summarize import parameters
from qtool.pipeline.trial import NORMAL, Divergence, Trials
from qtool.plan import LayerPlan, Plan, Planned
from qtool.plan.check import check
from qtool.plan.decide import decide
from qtool.plan.findings import Findings
from qtool.recipe.load import load_recipe
from qtool.recipe.parse import dump_format
from qtool.report.model import AllocationEntry
from qtool.report.units import size as spelled

NEAR = 1.005
"""Ratio of sizes at which the search for the smallest file ends."""
MEASURED = 8
"""Plans that this search measures at most."""


def allocated(
    job: Job, card: Mapping[str, Any], place: Path, strict: bool, edits: str, listener: Listener
) -> tuple[Job, AllocationEntry]:
    """The run with every layer decided, and how that came about.

    Args:
        job: the run, whose recipe has a budget.
        card: what the artifact's writer will be given, as far as it goes into files with tensors.
        place: file of scores: read if it is there, written otherwise; or a folder of such files, each about something.
        strict: refuse a file about something else.
        edits: what identifies the transforms of the model.
        listener: called with events of progress.

    Raises:
        PlanError: the budget is too small, has no limit, or leaves nothing open.
        CheckpointError, MissingExtra, HubError, NumericsError, StorageError: see `load_tokens`, `Pricing`, `ScoreFile`.
    """
    allocator = Allocator(job, card)
    allocator.refuse_too_small()
    samples, held_out = tokens_for(job)
    allocator.score(samples, held_out, place, strict, edits, listener)
    allocation = allocator.divide()
    findings = Findings(job.plan.recipe.layers)
    plan = allocator.plan(allocator.answer)
    check(plan.layers, plan.recipe.kv_cache, job.checkpoint, job.artifacts, findings)
    if lines := findings.lines():
        raise PlanError(lines, f"recipe {plan.recipe.name} does not fit {job.checkpoint.source}")
    return replace(job, plan=plan), allocation


class Allocator:
    """The division of one budget.

    Args:
        job: the run.
        card: see `allocated`.

    Attributes:
        answer: what was decided.
    """

    answer: Chosen
    scores: ScoreFile
    groups: Sequence[Group]
    rules: Mapping[str, tuple[LayerPlan, ...]]
    trials: Trials | None = None

    def __init__(self, job: Job, card: Mapping[str, Any]) -> None:
        assert job.plan.recipe.budget is not None
        self.job, self.card, self.budget = job, card, job.plan.recipe.budget
        (self.artifact,) = job.artifacts.values()
        self.open: tuple[Decision, ...] = decisions(job.plan, job.checkpoint, self.artifact)
        if not self.open:
            what = "no layer has a rule with one of its formats, so there is nothing to decide"
            raise PlanError([f"budget: {what}"], f"recipe {job.plan.recipe.name}")
        self.modules = tuple(modules(job.checkpoint))
        self.sizes: dict[Chosen, int] = {}
        self.tried: set[Chosen] = set()
        self.bytes = file_sizes(self.open, self.size)

    def plan(self, chosen: Chosen) -> Plan:
        """With these options."""
        return applied(self.job.plan, picked(self.open, chosen))

    def size(self, chosen: Chosen) -> int:
        """Bytes of the artifact's files with tensors, at most."""
        if chosen not in self.sizes:
            model = Planned(self.job.checkpoint, self.plan(chosen))
            self.sizes[chosen] = self.artifact.footprint(model, self.card).total
        return self.sizes[chosen]

    @property
    def limit(self) -> int | None:
        """Bytes that the budget allows; None if it limits something else."""
        if self.budget.bits is not None:
            return int(self.budget.bits * parameters(self.job.original) / 8)
        return self.like if self.budget.like else self.budget.size

    @cached_property
    def like(self) -> int:
        """Bytes of the artifact by the rules of the recipe that the budget names."""
        assert self.budget.like is not None
        plan = replace(self.job.plan, layers=self.ruled(self.budget.like))
        return self.artifact.footprint(Planned(self.job.checkpoint, plan), self.card).total

    def ruled(self, name: str) -> tuple[LayerPlan, ...]:
        """What the rules of a recipe give every layer."""
        recipe = load_recipe(name)
        layers, _ = decide(self.modules, recipe, self.job.checkpoint, Findings(recipe.layers))
        return layers

    def refuse_too_small(self) -> None:
        """Raises PlanError, RecipeError: nothing is small enough, there is no limit, or no recipe to compare with."""
        self.rules = {recipe: self.ruled(recipe) for recipe in self.budget.against}
        name, limit = f"recipe {self.job.plan.recipe.name}", self.limit
        if limit is None:
            if self.budget.kld is None:
                raise PlanError(["budget: no limit; give --fit SIZE, --bits BITS or --kld NATS"], name)
            return
        least = self.size(tuple(int(sizes.argmin()) for sizes in self.bytes))
        if least > limit:
            wanted = f"wanted at most {limit} bytes ({spelled(limit)})"
            found = f"found {least} ({spelled(least)}) with the smallest formats"
            hint = "raise the limit, or add smaller formats to budget.formats"
            raise PlanError([f"budget: the model cannot be so small: {wanted}, {found}; {hint}"], name)

    def score(
        self, samples: Tensor, held_out: Tensor, place: Path, strict: bool, edits: str, listener: Listener
    ) -> None:
        """Finds out what options cost, unless a file says so."""
        self.samples, self.held_out, self.listener = samples, held_out, listener
        self.scores = scores_at(place, self.identity(edits), strict)
        if self.scores.found is None:
            self.scores.found = Pricing(self.job, self.open, samples).run(listener)
            self.scores.save()
        costs = [d.costs(self.scores.found.costs) for d in self.open]
        self.groups = [Group(s, c) for s, c in zip(self.bytes, costs, strict=True)]

    def identity(self, edits: str) -> str:
        """Hash of everything that scores depend on."""
        job, digest = self.job, hashlib.sha256()
        options = [[p.module.name, p.label, dumped(p.format)] for d in self.open for o in d.options for p in o]
        place = [__version__, job.plan.source_fingerprint, edits, job.device.type, str(job.dtype)]
        digest.update(json.dumps([place, options], sort_keys=True).encode())
        for tokens in (self.samples, self.held_out):
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()

    def measure(self, chosen: Chosen) -> Divergence:
        """The divergence of a plan on held-out samples; known ones are not measured again."""
        key = hashlib.sha256(json.dumps([[p.label for p in o] for o in picked(self.open, chosen)]).encode()).hexdigest()
        self.tried.add(chosen)
        if key not in self.scores.measured:
            assert self.scores.found is not None
            if self.trials is None:
                self.listener(Event("allocate", 0, 0, "measuring plans on held-out samples"))
                self.trials = Trials(self.job.checkpoint, self.held_out, self.job.device)
            job = replace(self.job, plan=self.plan(chosen))
            found = self.trials.of(Roughly(job, self.scores.found.importance, self.scores.found.statics))
            self.scores.measured[key] = list(found.samples)
            self.scores.save()
            self.listener(Event("allocate", 0, 0, f"plan of {spelled(self.size(chosen))}", {"nats": found.mean}))
        return Divergence(tuple(self.scores.measured[key]))

    def divide(self) -> AllocationEntry:
        """Decides everything."""
        limit = self.limit
        own = self.fitting(limit) if limit is not None else self.small_enough(self.budget.kld or 0.0)
        found, other = self.measure(own), self.best_uniform(self.size(own) if limit is None else limit)
        self.answer = own
        entry = AllocationEntry(
            wanted=self.wanted(),
            limit=limit,
            nbytes=self.size(own),
            kld=found.mean,
            kld_error=found.error,
            tried=0,
            samples=len(self.samples),
            held_out=len(self.held_out),
        )
        if other:
            name, chosen = other
            compared = self.measure(chosen)
            fell_back = compared.mean < found.mean
            fields: dict[str, object] = {"uniform_kld": compared.mean, "uniform_kld_error": compared.error}
            fields |= {"uniform": name, "uniform_nbytes": self.size(chosen), "fell_back": fell_back}
            if fell_back:
                self.answer = chosen
                fields |= {"nbytes": self.size(chosen), "kld": compared.mean, "kld_error": compared.error}
            entry = entry.model_copy(update=fields)
        return entry.model_copy(update={"tried": len(self.tried)})

    def wanted(self) -> str:
        """The budget in words."""
        if self.budget.kld is not None:
            return f"a KL divergence of at most {self.budget.kld:g}"
        if self.budget.like is not None:
            return f"the size of {self.budget.like}"
        return f"{self.budget.bits:g} bits per weight" if self.budget.bits is not None else spelled(self.limit or 0)

    def fitting(self, limit: int) -> Chosen:
        """The choice that costs least among those that fit. Raises PlanError: none does."""
        found = fit(self.groups, limit, self.size)
        assert found is not None  # see refuse_too_small
        return found

    def best_uniform(self, limit: int) -> tuple[str, Chosen] | None:
        """Name and choice of the plan that promises most among those that nobody allocated and that fit."""
        fitting = [c for c in self.uniforms() if self.size(c[1]) <= limit]
        return min(fitting, key=lambda c: total(self.groups, c[1]), default=None)

    def uniforms(self) -> Iterator[tuple[str, Chosen]]:
        """Every format for all layers, and the rules of other recipes."""
        for i, candidate in enumerate(self.budget.formats):
            if (chosen := uniform(self.open, i)) is not None:
                yield f"{candidate.label} for all layers", chosen
        for name, layers in self.rules.items():
            plans = {p.module.name: p for p in layers}
            found = [decision.index(plans) for decision in self.open]
            if None not in found:
                yield name, tuple(i for i in found if i is not None)

    def small_enough(self, most: float) -> Chosen:
        """The smallest choice whose divergence is no larger, upper end of its confidence interval included.

        The ratio of what was measured to what scores promise changes slowly, so that each measurement says which size
        to measure next.

        Raises:
            PlanError: the best choice diverges further.
        """
        best = tuple(int(g.costs.argmin()) for g in self.groups)
        if (found := self.measure(best)).upper > most:
            missed = f"wanted a KL divergence of at most {most:g}, found {found.mean:.3g} + {NORMAL * found.error:.2g}"
            hint = "allow more, add larger formats to budget.formats, or hold out more samples"
            raise PlanError([f"budget: {missed} with the best formats; {hint}"], f"recipe {self.job.plan.recipe.name}")
        good, low, latest = best, sum(int(g.sizes.min()) for g in self.groups), (best, found)
        for _ in range(MEASURED - 1):
            chosen, divergence = latest
            promised = total(self.groups, chosen) * most / divergence.upper
            room = min(max(self.room(promised), low), matrices(self.groups, good))
            if matrices(self.groups, good) <= low * NEAR:
                break
            answer = least_cost(self.groups, room)
            assert answer is not None
            if answer.chosen in self.tried:
                answer = least_cost(self.groups, (low + matrices(self.groups, good)) // 2)
                assert answer is not None
                if answer.chosen in self.tried:
                    break
            latest = answer.chosen, self.measure(answer.chosen)
            if latest[1].upper <= most:
                good = answer.chosen
            else:
                low = max(low, matrices(self.groups, answer.chosen))
        return good

    def room(self, cost: float) -> int:
        """Bytes of matrices with which a choice costs no more, as far as scores go."""
        low, high = (sum(int(pick(g.sizes)) for g in self.groups) for pick in (min, max))
        while high > low * NEAR:
            middle = (low + high) // 2
            answer = least_cost(self.groups, middle)
            if answer is not None and answer.cost <= cost:
                high = middle
            else:
                low = middle
        return high


def dumped(fmt: Format | None) -> object:
    """A format as plain data."""
    return fmt and dump_format(fmt)
