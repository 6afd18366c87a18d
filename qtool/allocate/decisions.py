"""What a budget leaves open: for each module, or set of modules that need one format, the plans that it may get."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qtool.allocate.knapsack import Costs, Sizes
from qtool.artifact._base import Artifact
from qtool.checkpoint._base import Checkpoint, Layer
from qtool.methods._base import Method
from qtool.plan import LayerPlan, Plan
from qtool.plan.decide import kept_bits
from qtool.plan.fallback import choose
from qtool.recipe.budget import Candidate
from qtool.recipe.schema import Recipe

Option = tuple[LayerPlan, ...]
Scores = Mapping[str, Mapping[str, float]]
"""Loss that a module causes, by its name and the label of its plan."""


@dataclass(frozen=True)
class Decision:
    """One thing to be decided.

    Attributes:
        name: of the module, or of the set that needs one format.
        options: plans of the modules, as the candidates would have them; no two are alike.
        sizes: bytes of each option's matrices.
        candidates: the option that each candidate of the budget stands for; None: it cannot be had.
    """

    name: str
    options: tuple[Option, ...]
    sizes: tuple[int, ...]
    candidates: tuple[int | None, ...]

    def costs(self, scores: Scores) -> Costs:
        """What its options cost."""
        return np.array([math.fsum(scores[p.module.name][p.label] for p in option) for option in self.options])

    def index(self, plans: Mapping[str, LayerPlan]) -> int | None:
        """The option that equals some plans of its modules; None: none does."""
        wanted = tuple(plans[p.module.name].label for p in self.options[0])
        found = (i for i, option in enumerate(self.options) if tuple(p.label for p in option) == wanted)
        return next(found, None)


def decisions(plan: Plan, checkpoint: Checkpoint, artifact: Artifact) -> tuple[Decision, ...]:
    """Everything that a plan's budget leaves open, in the model's order.

    Args:
        plan: as the rules alone have it.
        checkpoint: the model.
        artifact: what is written.
    """
    recipe, budget = plan.recipe, plan.recipe.budget
    assert budget is not None

    sets: dict[str, list[LayerPlan]] = {}
    for p in plan.layers:
        sets.setdefault(artifact.one_format(p.module) or p.module.name, []).append(p)
    found = []
    for name, plans in sets.items():
        if not all(is_free(p, recipe, plan.limited_blocks) for p in plans):
            continue
        kept: dict[tuple[str, ...], Option] = {}
        labels: list[tuple[str, ...] | None] = []
        for candidate in budget.formats:
            tried = [planned(p, candidate, recipe, checkpoint, artifact) for p in plans]
            option = tuple(p for p in tried if p)
            labels.append(tuple(p.label for p in option) if len(option) == len(plans) else None)
            if labels[-1] is not None:
                kept.setdefault(labels[-1], option)
        if kept:
            sizes = [sum(nbytes(artifact, checkpoint, p) for p in option) for option in kept.values()]
            index = {label: i for i, label in enumerate(kept)}
            stands = tuple(None if label is None else index[label] for label in labels)
            found.append(Decision(name, tuple(kept.values()), tuple(sizes), stands))
    return tuple(found)


def file_sizes(found: Sequence[Decision], size: Callable[[tuple[int, ...]], int]) -> list[Sizes]:
    """Bytes that a file has for each option of each decision, int64 [J]: those of matrices, names and settings.

    Measured on one decision of a kind; others of its kind differ by the length of a name.

    Args:
        found: all decisions.
        size: bytes of the file of a choice, exactly.
    """
    base = tuple(int(np.argmin(decision.sizes)) for decision in found)
    known: dict[object, int] = {}
    sizes = []
    for i, decision in enumerate(found):
        own = []
        for j, option in enumerate(decision.options):
            kind = tuple((p.module.role, p.module.shape, p.label) for p in option)
            if kind not in known:
                known[kind] = size((*base[:i], j, *base[i + 1 :])) - size(base)
            own.append(decision.sizes[base[i]] + known[kind])
        sizes.append(np.array(own, np.int64))
    return sizes


def is_free(plan: LayerPlan, recipe: Recipe, limited: int | None) -> bool:
    """Whether a module's rule gives it one of the formats that the budget names; routers keep what rules say."""
    if plan.rule < 0 or recipe.budget is None or plan.module.kind == "router":
        return False
    if limited is not None and plan.module.block not in range(limited):
        return False
    rule = recipe.layers[plan.rule]
    pairs = [(candidate.weights, candidate.activations) for candidate in recipe.budget.formats]
    by_flag = rule.where.startswith("--tensor-type")  # what a user asked for by name is not open
    return not by_flag and rule.weights is not None and (rule.weights, rule.activations) in pairs


def planned(
    plan: LayerPlan, candidate: Candidate, recipe: Recipe, checkpoint: Checkpoint, artifact: Artifact
) -> LayerPlan | None:
    """A module's plan with a candidate instead of what its rule says; None: it or the artifact cannot have that."""
    rule, module = recipe.layers[plan.rule], plan.module
    residuals = candidate.residuals or rule.residuals
    measured = candidate.activations or any(residual.needs for residual in residuals)
    if measured and module.kind == "embedding":
        return None
    found: LayerPlan | None = None
    if candidate.weights is None:
        found = as_kept(plan, "source" if candidate.keep is True else str(candidate.keep), None, checkpoint)
    else:
        choice = choose(candidate.weights, rule.fallback or recipe.fallback, module.shape[1])
        if choice.problem or any(residual.misfit(*module.shape) for residual in residuals):
            return None
        if choice.format is None:
            found = as_kept(plan, choice.keep, choice.fallback, checkpoint)
        else:
            own = rule.method or (recipe.method if module.kind == "linear" else None) or Method.of("rtn")
            found = replace(
                plan,
                format=choice.format,
                method=own,
                activations=candidate.activations,
                keep="source",
                fallback=choice.fallback,
                bits=Layer(choice.format, residuals=residuals).storage_bits(*module.shape),
                residuals=residuals,
            )
    if found is None or not artifact.carries(checkpoint, module, found.layer, found.keep).possible:
        return None
    return found


def as_kept(plan: LayerPlan, keep: str, fallback: str | None, checkpoint: Checkpoint) -> LayerPlan | None:
    """A module that is not quantized; None: operations on its input stand in the way."""
    if plan.input_ops:
        return None
    bits = kept_bits(plan.module, keep, checkpoint)
    return LayerPlan(plan.module, None, None, None, keep, fallback, plan.rule, bits)


def nbytes(artifact: Artifact, checkpoint: Checkpoint, plan: LayerPlan) -> int:
    """Bytes of a matrix in the artifact."""
    return artifact.nbytes(checkpoint, plan.module, plan.layer, plan.keep)


def applied(plan: Plan, options: Iterable[Option]) -> Plan:
    """A plan with what was decided."""
    chosen = {p.module.name: p for option in options for p in option}
    return replace(plan, layers=tuple(chosen.get(p.module.name, p) for p in plan.layers))


def picked(found: Sequence[Decision], chosen: Sequence[int]) -> list[Option]:
    """The options with these indices."""
    return [decision.options[i] for decision, i in zip(found, chosen, strict=True)]


def uniform(found: Sequence[Decision], candidate: int) -> tuple[int, ...] | None:
    """Every decision for one candidate of the budget; None: some modules cannot have it."""
    chosen = tuple(decision.candidates[candidate] for decision in found)
    return None if None in chosen else tuple(i for i in chosen if i is not None)
