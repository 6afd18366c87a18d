"""Modules of few rows that read one input, solved on the CPU as one matrix.

Rows have nothing to do with each other, so codes are those of each module alone. But a walk over few rows takes half as
long as one over many, and threads wait for each other at the end of each.

Shape letters: N rows of all modules, K columns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint
from qtool.formats._base import Quantized
from qtool.methods._base import Solution
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.parallel import row_shares, side_by_side
from qtool.pipeline.abreast import Readers, alike
from qtool.pipeline.entries import Sums
from qtool.pipeline.found import Found
from qtool.pipeline.solve import naming, refuse_infinite
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats
from qtool.stats.gram import gram_of

MOST = 1 << 22
"""Numbers of a matrix; larger ones keep threads busy for long, and stacked take memory."""


def solve_stacked(inputs: Sequence[Readers], checkpoint: Checkpoint) -> dict[str, Found]:
    """Solves the readers of inputs that have several, if they are small and alike; the rest is not named."""
    found: dict[str, Found] = {}
    for plans, stats in inputs:
        size = sum(math.prod(p.module.shape) for p in plans)
        if len(plans) > 1 and size <= MOST and alike(plans, stats, checkpoint):
            found |= solve_readers(plans, stats, checkpoint)
    return found


def solve_readers(plans: Sequence[LayerPlan], stats: InputStats, checkpoint: Checkpoint) -> dict[str, Found]:
    """Modules by name. Raises NumericsError: one of them is not finite."""
    method, fmt = plans[0].method, plans[0].format
    assert method is not None
    assert fmt is not None
    with marked("weights read"):
        w = torch.cat([checkpoint.tensor(f"{p.module.name}.weight").float() for p in plans])
    begin, edges = time.monotonic(), [0, *accumulate(p.module.shape[0] for p in plans)]

    def solve_part(part: tuple[int, int]) -> list[Found | None]:
        with marked("solving"):
            solution = method.solve(w[slice(*part)], stats, fmt)
        with marked("errors"):
            w_hat, found = solution.quantized.decode(), list[Found | None]()
            for p, (a, b) in zip(plans, pairwise(edges), strict=True):
                here = slice(max(a - part[0], 0), max(min(b, part[1]) - part[0], 0))
                found.append(
                    rows_of(p, w[slice(*part)], w_hat, solution, here, stats) if here.start < here.stop else None
                )
            return found

    with naming(", ".join(p.module.name for p in plans)):
        with marked("factors"):
            method.prepare(stats, fmt)
        solved = side_by_side(solve_part, row_shares(len(w)))
    seconds = (time.monotonic() - begin) / len(plans)
    by_module = zip(plans, zip(*solved, strict=True), strict=True)
    return {p.module.name: joined([part for part in parts if part], seconds) for p, parts in by_module}


def rows_of(plan: LayerPlan, w: Tensor, w_hat: Tensor, solution: Solution, here: slice, stats: InputStats) -> Found:
    """Some of the rows that were solved, which are a module's.

    Args:
        plan: of the module.
        w: float32 [rows, K], all that were solved.
        w_hat: the same decoded.
        solution: of them.
        here: which of them.
        stats: of the input.
    """
    assert plan.method is not None
    refuse_infinite(w_hat[here], plan)
    target = None if solution.target is None else solution.target[here]
    sums = Sums.of(w[here], w_hat[here], gram_of(stats), target)
    rows = solution.quantized.rows(here.start, here.stop)
    return Found(rows, (), sums, plan.method.name(), (plan.fallback, solution.fallback), 0.0)


def joined(parts: Sequence[Found], seconds: float) -> Found:
    """A module of its rows, in memory of their own, and what it took."""
    codes = torch.cat([part.quantized.codes for part in parts])
    params = {name: torch.cat([part.quantized.params[name] for part in parts]) for name in parts[0].quantized.params}
    remarks = tuple(remark for part in parts for remark in part.remarks)
    quantized = Quantized(codes, params, parts[0].quantized.format)
    return Found(quantized, (), sum((part.sums for part in parts), Sums()), parts[0].method, remarks, seconds)
