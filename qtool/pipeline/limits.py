"""What a budget limits beside bytes: bit operations (HAWQ-V3), and time by a table that a user measured (OHQ).

A table is YAML: microseconds that a layer takes for a token, by what becomes of it, as plans call that; a number holds
for a million weights, a mapping for shapes:

    q4_k: 3.1
    int8-channel with int8-token inputs: {4096x4096: 41.2, 14336x4096: 140.5}

Shape letters: N rows, K columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qtool.allocate.decisions import Decision
from qtool.allocate.within import Constraint
from qtool.checkpoint._base import Checkpoint, Module
from qtool.checkpoint.config import read_text
from qtool.errors import CheckpointError, PlanError, RecipeError, one_line
from qtool.plan import LayerPlan, Plan

UNROUNDED = 16.0
"""Bits of numbers that are left as they are."""


def constraints(plan: Plan, open_: Sequence[Decision], checkpoint: Checkpoint) -> tuple[Constraint, ...]:
    """The limits beside bytes, for what is open; what the other layers take is taken off.

    Args:
        plan: of the run.
        open_: what is to be decided.
        checkpoint: the model.

    Raises:
        RecipeError: a table cannot be read, or lacks a layer.
        PlanError: no choice keeps a limit.
    """
    budget, often = plan.recipe.budget, Often(plan, checkpoint)
    assert budget is not None
    found = []
    if budget.operations is not None:
        whole = sum(often(p.module) * math.prod(p.module.shape) * UNROUNDED**2 for p in plan.layers)
        share = Amounts(plan, open_, lambda p: often(p.module) * operations(p) / whole)
        found.append(share.constraint("bit operations", budget.operations, "of those of 16 bits"))
    if budget.latency is not None:
        table = Table(Path(budget.latency.table))
        time = Amounts(plan, open_, lambda p: often(p.module) * table(p) / 1000)
        found.append(time.constraint("time of a token", budget.latency.milliseconds, "ms"))
    for c in found:
        if c.least() > c.most:
            missed = f"wanted at most {c.most:.4g} {c.unit}, found {c.least():.4g} with the quickest formats"
            raise PlanError([f"budget: {c.name}: {missed}, beside layers that are not open"], plan.recipe.name)
    return tuple(found)


class Often:
    """How many products with a matrix a token takes: none with an embedding alone, few with an expert."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint) -> None:
        self.tied = checkpoint.tied
        self.used = checkpoint.config.get("num_experts_per_tok")
        self.experts = Counter((p.module.block, p.module.role) for p in plan.layers if p.module.expert is not None)

    def __call__(self, module: Module) -> float:
        """See above."""
        if module.kind == "embedding":
            return float(self.tied)
        if module.expert is None or not isinstance(self.used, int):
            return 1.0
        return min(1.0, self.used / self.experts[module.block, module.role])


class Amounts:
    """What layers have of something.

    Args:
        plan: of the run.
        open_: what is to be decided.
        amount: of one layer.
    """

    def __init__(self, plan: Plan, open_: Sequence[Decision], amount: Callable[[LayerPlan], float]) -> None:
        decided = {p.module.name for d in open_ for p in d.options[0]}
        self.fixed = sum(amount(p) for p in plan.layers if p.module.name not in decided)
        self.open = [np.array([sum(amount(p) for p in option) for option in d.options]) for d in open_]

    def constraint(self, name: str, most: float, unit: str) -> Constraint:
        """A limit of it. Fixed layers are an amount of the first decision, so that numbers are those of the model."""
        return Constraint(name, [self.open[0] + self.fixed, *self.open[1:]], most, unit)


def operations(plan: LayerPlan) -> float:
    """Bit operations of a product with a vector: multiplications, times bits of weights, times bits of inputs."""
    inputs = UNROUNDED if plan.activations is None else math.log2(len(plan.activations.levels()))
    weights = UNROUNDED if plan.format is None else plan.bits / math.prod(plan.module.shape)
    return math.prod(plan.module.shape) * weights * math.ceil(inputs)


class Table:
    """A table of latencies. Raises RecipeError: it cannot be read, or is no such table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = yaml.safe_load(read_text(path))
        except (CheckpointError, OSError, yaml.YAMLError, RecursionError, ValueError) as error:
            raise RecipeError([f"cannot read {path}: {one_line(error)}"], "budget.latency") from None
        if not isinstance(found, Mapping) or not all(map(well_formed, found.values())):
            wanted = "microseconds by format, or by format and shape (4096x4096)"
            raise RecipeError([f"{path} is no table: wanted {wanted}"], "budget.latency")
        self.rows = {str(label): row for label, row in found.items()}

    def __call__(self, plan: LayerPlan) -> float:
        """Microseconds that a layer takes for a token. Raises RecipeError: the table lacks it."""
        n, k = plan.module.shape
        row: Any = self.rows.get(plan.label)
        if isinstance(row, Mapping):
            row = row.get(f"{n}x{k}")
            if row is not None:
                return float(row)
        elif row is not None:
            return float(row) * n * k / 1e6
        raise RecipeError([f"{self.path} has no time for {plan.label!r} of {n}x{k}; add it"], "budget.latency")


def well_formed(row: object) -> bool:
    """Whether a row of a table is a time, or times by shape."""
    times = row.values() if isinstance(row, Mapping) else (row,)
    return all(isinstance(t, int | float) and not isinstance(t, bool) and 0 <= t < math.inf for t in times)
