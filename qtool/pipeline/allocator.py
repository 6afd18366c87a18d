"""What a recipe's budget leaves open, what each choice weighs and costs, and how far plans take the model, measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qtool.allocate.decisions import Decision, applied, decisions, file_sizes, picked, uniform
from qtool.allocate.fit import Chosen
from qtool.allocate.knapsack import Group, total
from qtool.allocate.within import fit_within
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.modules import modules
from qtool.errors import PlanError
from qtool.formats._base import Format
from qtool.formats._spelling import dump_format
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.limits import constraints
from qtool.pipeline.prepare import Job
from qtool.pipeline.roughly import Roughly
from qtool.pipeline.scores import ScoreFile, scores_at
from qtool.pipeline.sensitivity import Pricing
from qtool.pipeline.summarize import parameters
from qtool.pipeline.trial import Divergence, Trials
from qtool.pipeline.work import code_digest
from qtool.plan import LayerPlan, Plan, Planned
from qtool.plan.check import check
from qtool.plan.decide import decide
from qtool.plan.findings import Findings
from qtool.recipe.load import load_recipe
from qtool.report.model import AllocationEntry
from qtool.report.units import size as spelled
from qtool.store.files import check_file

CLEAR = 0.8
"""Ratio of rounded plans' divergences below which no method turns who is better."""


class Contest(NamedTuple):
    """A plan and the best one that nobody allocated, and how far each takes the model.

    Attributes:
        own: the plan.
        own_kld: its divergence.
        name, other, other_kld: the same of the other one; None: none fits.
        carried_out: whether divergences are of what methods made of both, rather than of rounded models.
    """

    own: Chosen
    own_kld: Divergence
    name: str | None = None
    other: Chosen | None = None
    other_kld: Divergence | None = None
    carried_out: bool = False

    @property
    def fell_back(self) -> bool:
        """Whether the other one is better."""
        return self.other_kld is not None and self.other_kld.mean < self.own_kld.mean

    @property
    def taken(self) -> Chosen:
        """The better one."""
        return self.other if self.fell_back and self.other is not None else self.own

    @property
    def close(self) -> bool:
        """Whether rounded models say too little about which is better when a method has chosen the codes."""
        if self.carried_out or self.other_kld is None or self.other == self.own:
            return False
        low, high = sorted((self.own_kld.mean, self.other_kld.mean))
        return low > CLEAR * high


class Allocator:
    """The division of one budget.

    Args:
        job: the run.
        card: see `qtool.pipeline.allocate.allocated`.
    """

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
        self.constraints = constraints(job.plan, self.open, job.checkpoint)

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
        """Finds out what options cost, unless a file says so. Raises StorageError: they could not be kept."""
        self.samples, self.held_out, self.listener = samples, held_out, listener
        self.scores = scores_at(place, self.identity(edits), strict)
        if self.scores.found is None:
            check_file(self.scores.path)
            self.scores.found = Pricing(self.job, self.open, samples).run(listener)
            self.scores.save()
        costs = [d.costs(self.scores.found.costs) for d in self.open]
        self.groups = [Group(s, c) for s, c in zip(self.bytes, costs, strict=True)]

    def identity(self, edits: str) -> str:
        """Hash of everything that scores depend on, the program included."""
        job, digest = self.job, hashlib.sha256()
        options = [
            [p.module.name, p.label, dumped(p.format), p.method and p.method.spelled()]
            for d in self.open
            for o in d.options
            for p in o
        ]
        place = [code_digest(), job.plan.source_fingerprint, edits, job.device.type, str(job.dtype), self.budget.scores]
        digest.update(json.dumps([place, options], sort_keys=True).encode())
        for tokens in (self.samples, self.held_out):
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()

    def measure(self, chosen: Chosen) -> Divergence:
        """The divergence of a plan, tried rounded, on held-out samples; known ones are not measured again."""
        self.tried.add(chosen)
        return self.known(chosen, "", partial(self.rounded, chosen))

    def rounded(self, chosen: Chosen) -> Checkpoint:
        """The model as a plan would leave it, rounded, with errors as large as its methods leave them."""
        assert self.scores.found is not None
        return Roughly(replace(self.job, plan=self.plan(chosen)), *self.scores.found.known)

    def known(self, chosen: Chosen, run: str, model: Callable[[], Checkpoint]) -> Divergence:
        """The divergence of a plan, measured once.

        Args:
            chosen: the plan.
            run: what else it depends on.
            model: makes what is measured.
        """
        labels = [[p.label for p in o] for o in picked(self.open, chosen)]
        key = hashlib.sha256((json.dumps(labels) + run).encode()).hexdigest()
        if key not in self.scores.measured:
            if self.trials is None:
                self.listener(Event("allocate", 0, 0, "measuring plans on held-out samples"))
                self.trials = Trials(self.job.checkpoint, self.held_out, self.job.device)
            found = self.trials.of(model())
            self.scores.measured[key] = list(found.samples)
            self.scores.save()
            self.listener(Event("allocate", 0, 0, f"plan of {spelled(self.size(chosen))}", {"nats": found.mean}))
        return Divergence(tuple(self.scores.measured[key]))

    @property
    def confirms(self) -> bool:
        """Whether a close contest is worth carrying both plans out: rounding to nearest is not what will be done."""
        methods = {p.method.name() for d in self.open for o in d.options for p in o if p.method}
        return self.budget.confirm and bool(methods - {"rtn"})

    def entry(self, contest: Contest) -> AllocationEntry:
        """What the report says of a contest."""
        other = contest.other_kld
        taken = other if contest.fell_back and other else contest.own_kld
        return AllocationEntry(
            wanted=self.wanted(),
            limit=self.limit,
            nbytes=self.size(contest.taken),
            kld=taken.mean,
            kld_error=taken.error,
            fell_back=contest.fell_back,
            carried_out=contest.carried_out,
            beside={f"{c.name}, {c.unit}": (c.of(contest.taken), c.most) for c in self.constraints},
            tried=len(self.tried),
            samples=len(self.samples),
            held_out=len(self.held_out),
            uniform=contest.name,
            uniform_nbytes=None if contest.other is None else self.size(contest.other),
            uniform_kld=other and other.mean,
            uniform_kld_error=other and other.error,
        )

    def decided(self, chosen: Chosen) -> Job:
        """The run with a choice. Raises PlanError: layers of it do not go together."""
        findings, plan = Findings(self.job.plan.recipe.layers), self.plan(chosen)
        check(plan.layers, plan.recipe.kv_cache, self.job.checkpoint, self.job.artifacts, findings)
        if lines := findings.lines():
            raise PlanError(lines, f"recipe {plan.recipe.name} does not fit {self.job.checkpoint.source}")
        return replace(self.job, plan=plan)

    def wanted(self) -> str:
        """The budget in words."""
        if self.budget.kld is not None:
            return f"a KL divergence of at most {self.budget.kld:g}"
        if self.budget.like is not None:
            return f"the size of {self.budget.like}"
        return f"{self.budget.bits:g} bits per weight" if self.budget.bits is not None else spelled(self.limit or 0)

    def fitting(self, limit: int) -> Chosen:
        """The choice that costs least among those that keep all limits. Raises PlanError: none does."""
        if (found := self.solved(self.groups, limit)) is None:
            names = " and ".join(["bytes", *(c.name for c in self.constraints)])
            line = f"budget: no plan keeps the limits of {names} together; raise one of them"
            raise PlanError([line], f"recipe {self.job.plan.recipe.name}")
        return found

    def solved(self, groups: Sequence[Group], limit: int) -> Chosen | None:
        """The choice that costs least by some costs; None: none keeps all limits."""
        return fit_within(groups, limit, self.size, self.constraints)

    def best_uniform(self, limit: int) -> tuple[str, Chosen] | None:
        """Name and choice of the plan that promises most among those that nobody allocated and that fit."""
        small = [c for c in self.uniforms() if self.size(c[1]) <= limit]
        fitting = [c for c in small if all(limit.keeps(c[1]) for limit in self.constraints)]
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


def dumped(fmt: Format | None) -> object:
    """A format as plain data."""
    return fmt and dump_format(fmt)
