"""The modules of one unit, solved as their inputs are reached, and then block by block where methods do so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from qtool.calibrate.inputs import fit_static
from qtool.checkpoint._base import Layer, QuantizedCheckpoint
from qtool.errors import NumericsError
from qtool.methods._base import BlockTask, Course, Method, Solution
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.abreast import solve_alike
from qtool.pipeline.entries import Sums, solved_entry
from qtool.pipeline.found import Found, assembled, exchanged, rows_to_solve
from qtool.pipeline.prepare import Job
from qtool.pipeline.requantize import kept_as_stored
from qtool.pipeline.rows import row_groups
from qtool.pipeline.solve import TAKEN_OVER, informed, refuse_infinite, solve, tied
from qtool.pipeline.stacked import solve_stacked
from qtool.pipeline.units import Unit
from qtool.plan import LayerPlan
from qtool.report.model import BlockEntry, LayerEntry, course_entries
from qtool.residuals._base import Matrix
from qtool.stats._base import InputStats
from qtool.stats.gram import gram_of
from qtool.stats.values import Values
from qtool.store.manifest import StoredLayer

CPU = torch.device("cpu")
Input = tuple[tuple[LayerPlan, ...], InputStats | None]
"""The modules that read an input, and what was measured there."""
Solved = Mapping[str, tuple[Matrix, Layer]]
"""Matrix and layer of modules, by name."""


class Solver(Protocol):
    """What the walk through a unit asks."""

    @property
    def resumed(self) -> bool:
        """True if an earlier run solved the unit, so that nothing has to be measured."""

    def solve(self, inputs: Sequence[Input], weights: Mapping[str, Tensor] | None = None) -> Solved:
        """Solves the modules that read some inputs, given what was measured there.

        Args:
            inputs: who reads them, and what was measured.
            weights: of modules, [N, K] by name, where they are at hand.
        """

    def solve_block(self, task: BlockTask) -> Iterator[Solved]:
        """Solves modules once more, given the whole block; `task` names none of them yet."""


class UnitSolver:
    """Solves a unit and keeps what it found.

    Args:
        unit: what to solve.
        job: the run.
        ranks: who solves it together.
        alone: whether nobody runs the model meanwhile, so that what is not decoded is not missed.

    Attributes:
        matrices, layers, entries: by module.
        taken: entries of modules that stay as the source's file has them, in the place of `matrices`.
        blocks: what methods that solve blocks measured.
    """

    resumed = False

    def __init__(self, unit: Unit, job: Job, ranks: Ranks = ALONE, alone: bool = False) -> None:
        self.unit, self.job, self.ranks, self.alone = unit, job, ranks, alone
        self.taken: dict[str, StoredLayer] = {}
        self.matrices: dict[str, Matrix] = {}
        self.layers: dict[str, Layer] = {}
        self.entries: dict[str, LayerEntry] = {}
        self.blocks: list[BlockEntry] = []
        self.stats: dict[str, InputStats | None] = {}
        """Of modules that are solved once more."""
        self.blockwise = frozenset(p.module.name for p in unit.blockwise)

    def solve(self, inputs: Sequence[Input], weights: Mapping[str, Tensor] | None = None) -> Solved:
        """See `Solver.solve`."""
        if self.alone:
            inputs = [(tuple(p for p in plans if not self.leave(p)), stats) for plans, stats in inputs]
        readers = [(p, stats) for plans, stats in inputs for p in plans]
        least = self.job.plan.recipe.calibration.min_tokens
        usable = {p.module.name: with_enough_data(p, stats, least) for p, stats in readers}
        rows = rows_to_solve([p for p, _ in readers], [tied(p) for p, _ in readers], self.ranks)
        self.prepare_together([(usable[p.module.name], stats) for p, stats in readers])
        found = self.solve_alike(inputs, usable, rows, weights or {})
        for p, stats in readers:
            name, (start, stop) = p.module.name, rows[p.module.name]
            self.layers[name], plan = with_static(p, stats), usable[name]
            if start < stop and name not in found:
                first = replace(plan, method=plan.method and plan.method.first)
                seen = stats if plan is p else None
                merged = self.unit.merged(p)
                w = (weights or {}).get(name)
                found[name] = solve(first, self.job.checkpoint, seen, self.job.device, merged, (start, stop), w)
        with marked("exchange"):
            together = exchanged(found, self.ranks, self.job.device)
        for p, stats in readers:
            self.keep(p, usable[p.module.name], stats, together[p.module.name])
        for _, stats in inputs:
            if stats:  # which are kept while a block is trained
                stats.forget()
        return self.found(p.module.name for p, _ in readers)

    def prepare_together(self, readers: Sequence[tuple[LayerPlan, InputStats | None]]) -> None:
        """Has methods find out together what the rows of all processes need, but of experts, which one solves whole."""
        for p, stats in readers if self.ranks.size > 1 else ():
            if stats and p.method and p.format and p.module.expert is None and stats.of(p.module.name) == (stats,):
                with marked("factors"):
                    p.method.first.prepare_together(stats, p.format, self.ranks)

    def leave(self, plan: LayerPlan) -> bool:
        """Leaves a module as the source has it, if that is what is wanted; True if so."""
        name, checkpoint = plan.module.name, self.job.checkpoint
        if not kept_as_stored(checkpoint, plan) or not isinstance(checkpoint, QuantizedCheckpoint):
            return False
        layer = with_static(plan, None)
        self.taken[name] = StoredLayer.taken_over(checkpoint.layers[name].format, plan.module.shape, layer)
        self.layers[name] = layer
        exact = Sums(signal=1.0, output=1.0)
        self.entries[name] = solved_entry(plan, TAKEN_OVER, None, exact, [plan.fallback], 0.0)
        return True

    def solve_alike(
        self,
        inputs: Sequence[Input],
        usable: Mapping[str, LayerPlan],
        rows: Mapping[str, tuple[int, int]],
        weights: Mapping[str, Tensor],
    ) -> dict[str, Found]:
        """Those of the modules that are solved side by side; see `abreast.solve_alike`."""
        mine = {name for name, part in rows.items() if usable[name].module.shape[0] == part[1] - part[0]}
        whole = [
            (plans, stats)
            for plans, stats in inputs
            if stats and all(usable[p.module.name] is p and p.module.name in mine for p in plans)
        ]
        if self.job.device == CPU:
            return solve_stacked(whole, self.job.checkpoint)
        return solve_alike(whole, self.job.checkpoint, weights, self.job.device) if len(whole) > 1 else {}

    def keep(self, plan: LayerPlan, usable: LayerPlan, stats: InputStats | None, parts: Sequence[Found]) -> None:
        """Keeps a module.

        Args:
            plan: of it.
            usable: what was done instead, if too few tokens came by.
            stats: of its input.
            parts: its rows.
        """
        name, enough = plan.module.name, usable is plan
        view = stats.of(name)[0] if stats and enough and plan.weight_needs else None
        self.matrices[name], entry = assembled(usable, view, parts)
        measured = enough or stats is None
        self.entries[name] = entry if measured else entry.model_copy(update={"tokens": stats and stats.tokens})
        if name in self.blockwise and enough and entry.method != TAKEN_OVER:
            self.stats[name] = stats

    def found(self, names: Iterator[str]) -> Solved:
        """What is known of modules."""
        return {name: (self.matrices[name], self.layers[name]) for name in names}

    def solve_block(self, task: BlockTask) -> Iterator[Solved]:
        """See `Solver.solve_block`; method by method, each behind those before it."""
        owned = [p for p in self.unit.blockwise if p.module.name in self.stats]
        for method in dict.fromkeys(p.method for p in owned if p.method):
            mine = {p.module.name: p for p in owned if p.method == method}
            begin = time.monotonic()
            full = replace(self.completed(task, mine), note=partial(self.note, task.block, method.name()))
            with marked("learning"):
                solutions = method.solve_block(full)
            seconds = (time.monotonic() - begin) / len(mine)
            for name, p in mine.items():
                entry = self.entries[name]
                update = {"method": method.name(), "seconds": entry.seconds + seconds}
                self.entries[name] = entry.model_copy(update=update)
                if name in solutions:
                    self.accept(p, solutions[name], full)
            yield self.found(iter(solutions))

    def note(self, block: int, method: str, losses: Mapping[str, float], course: Course) -> None:
        """Keeps what a method measured."""
        entry = BlockEntry(block=block, method=method, losses=dict(losses), course=course_entries(course))
        self.blocks.append(entry)

    def completed(self, task: BlockTask, plans: Mapping[str, LayerPlan]) -> BlockTask:
        """The task with modules to solve."""
        checkpoint, device = self.job.checkpoint, self.job.device
        matrices = {name: self.matrices[name].to(device) for name in plans}
        formats = {name: informed(p.format, checkpoint, self.unit.merged(p)) for name, p in plans.items() if p.format}
        return replace(
            task,
            plans=plans,
            formats=formats,
            weights={name: checkpoint.tensor(f"{name}.weight").to(device, torch.float32) for name in plans},
            found={name: Solution(m.quantized, residuals=m.residuals) for name, m in matrices.items()},
            stats={name: stats.of(name)[0] for name in plans if (stats := self.stats[name]) is not None},
        )

    def accept(self, plan: LayerPlan, solution: Solution, task: BlockTask) -> None:
        """Takes a solution in the place of what was found first.

        Raises:
            NumericsError: it is not finite.
        """
        name, w = plan.module.name, task.weights[plan.module.name]
        assert plan.format is not None
        assert plan.method is not None
        kinds = [correction.residual for correction in solution.residuals]
        if kinds and kinds != list(plan.residuals):
            wanted, found = (", ".join(r.label for r in some) or "none" for some in (plan.residuals, kinds))
            raise NumericsError(f"{plan.method.name()}: corrections of {name}", wanted=wanted, found=found)
        quantized = replace(solution.quantized.to(CPU), format=plan.format)
        matrix = Matrix(quantized, solution.residuals or self.matrices[name].residuals).to(CPU)
        w_hat = matrix.decode().to(w.device)
        refuse_infinite(w_hat, plan)
        stats, entry = self.stats[name], self.entries[name]
        sums, views = Sums(), stats.of(name) if stats else (None,)
        for view, part in row_groups(len(w), views):
            target = None if solution.target is None else solution.target[part]
            sums += Sums.of(w[part], w_hat[part], gram_of(view), target)
        update = {
            "fallback": "; ".join(filter(None, (entry.fallback, solution.fallback))) or None,
            **sums.errors(gram_of(views[0]) is not None),
        }
        self.matrices[name], self.entries[name] = matrix, entry.model_copy(update=update)


def with_static(plan: LayerPlan, stats: InputStats | None) -> Layer:
    """A layer with the scale of its inputs, if that is to be found in calibration.

    Raises:
        NumericsError: no token reached it.
    """
    layer = plan.layer
    assert layer is not None
    if not layer.activations or not layer.activations.static:
        return layer
    if stats is None or Values not in stats or not stats.tokens:
        hint = "measure it on more tokens (calibration: samples, experts: all), or let inputs be scaled token by token"
        raise NumericsError(f"no calibration token reached {plan.module.name}, so its inputs have no scale", hint=hint)
    (static,) = fit_static(stats[Values].histogram, layer.activations)
    return replace(layer, static=static)


def with_enough_data(plan: LayerPlan, stats: InputStats | None, least: int) -> LayerPlan:
    """A layer's plan; without data, and saying so, if it is an expert's and fewer than `least` tokens reached it."""
    if not plan.weight_needs or stats is None or plan.module.expert is None:
        return plan
    if stats.tokens >= least:
        return plan
    text = f"rounded to nearest: fewer than {least} calibration tokens reached this expert"
    return replace(plan, method=Method.of("rtn"), fallback="; ".join(filter(None, (plan.fallback, text))))
