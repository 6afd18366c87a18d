"""What a method's own codes cost, from the few tokens that they are chosen for and judged by.

A method that looks at inputs fits them: on other tokens its errors are larger. A ridge regression of d degrees of
freedom on R tokens leaves (1 - d / R)^2 of the squared error that it has elsewhere (generalized cross-validation,
https://doi.org/10.1080/00401706.1979.10489751). GPTQ is such a regression: of each column's error on the columns that
may make up for it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._base import Format
from qtool.methods.gptq import GPTQ
from qtool.numerics.solving.linalg import degrees_of_freedom
from qtool.pipeline.solve import solve_rows
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram


def solver(plan: LayerPlan) -> GPTQ | None:
    """What chooses a layer's codes row by row for its inputs, if that is GPTQ, or what begins with it."""
    method = plan.method and plan.method.first
    by_rows = plan.format is not None and plan.format.by_rows and not plan.residuals
    return method if isinstance(method, GPTQ) and by_rows else None


def solved(plan: LayerPlan, fmt: Format, w: Tensor, stats: InputStats) -> Tensor:
    """Some rows of a layer's matrix as its method would leave them, float32 [M, K].

    Args:
        plan: with a `solver`.
        fmt: its format, see `informed`.
        w: float32 [M, K].
        stats: of what it reads.

    Raises:
        NumericsError: the result is not finite.
    """
    parts = solve_rows(replace(plan, method=solver(plan)), fmt, w, stats)
    return torch.cat([solution.quantized.decode().to(w.device) for solution, _ in parts])


def optimism(plan: LayerPlan, stats: InputStats) -> float:
    """Ratio of squared errors on other tokens to those on tokens that codes were chosen for; 1 without data."""
    method = solver(plan)
    if method is None:
        return 1.0
    key = ("freedom", method.damp)
    if key not in stats.cache:
        stats.cache[key] = 0.0
        with suppress(NumericsError):  # then codes are rounded
            stats.cache[key] = degrees_of_freedom(stats[Gram].matrix, method.damp)
    freedom: float = stats.cache[key]  # type: ignore[assignment]
    return (1 - freedom / stats.tokens) ** -2
