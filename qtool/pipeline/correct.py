"""Finds what is kept beside the codes of one matrix: for the codes that its method chose, or by turns with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.formats._base import Quantized
from qtool.methods._base import Solution
from qtool.numerics.metrics import energy
from qtool.residuals._base import Correction, Residual


def correct(
    residuals: Sequence[Residual],
    w: Tensor,
    gram: Tensor | None,
    solution: Solution,
    solve: Callable[[Tensor], Sequence[Solution]],
    turns: int,
) -> tuple[Solution, tuple[Correction, ...]]:
    """Codes and corrections of a matrix.

    Args:
        residuals: what is declared, in order.
        w: float32 [N, K].
        gram: X^T X of its inputs, float32 [K, K]; None without data.
        solution: codes of the matrix.
        solve: chooses codes for another matrix like it, in parts of some rows each.
        turns: how often it does for what corrections leave, as long as that helps.

    Returns:
        The codes, with the method's target for the matrix itself, and the corrections.
    """
    target = w if solution.target is None else solution.target
    if any(residual.before for residual in residuals):
        corrections, rest = fit(residuals, w, gram)
        solution = replace(joined(solve(rest)), target=solution.target)
        left = target - (w - rest) - decoded(solution, w)
    else:
        corrections, left = fit(residuals, target - decoded(solution, w), gram)
    least = energy(left, gram)
    if len(residuals) == 1 and (pair := residuals[0].jointly(target, solution.quantized)):
        together = Correction(residuals[0], pair[1])
        if (cost := energy(target - together.apply(pair[0].decode().to(w.device)), gram)) < least:
            return Solution(pair[0], solution.fallback, solution.target), (together,)
    for _ in range(turns):
        rest = w
        for correction in corrections:
            rest = rest - correction.apply(torch.zeros_like(w))
        again = joined(solve(rest))
        corrections_again, left = fit(residuals, target - decoded(again, w), gram)
        if not (cost := energy(left, gram)) < least:
            break
        solution, least = Solution(again.quantized, again.fallback, solution.target), cost
        corrections = corrections_again
    return solution, corrections


def fit(residuals: Sequence[Residual], error: Tensor, gram: Tensor | None) -> tuple[tuple[Correction, ...], Tensor]:
    """Corrections of an error, each of what those before it leave; and what they all leave, float32 [N, K]."""
    corrections = []
    for residual in residuals:
        correction = Correction(residual, residual.fit(error, gram))
        error = error - correction.apply(torch.zeros_like(error))
        corrections.append(correction)
    return tuple(corrections), error


def joined(parts: Sequence[Solution]) -> Solution:
    """Solutions for rows that follow each other, as one."""
    first = parts[0].quantized
    params = {name: torch.cat([part.quantized.params[name] for part in parts]) for name in first.params}
    quantized = Quantized(torch.cat([part.quantized.codes for part in parts]), params, first.format)
    targets = [part.target for part in parts if part.target is not None]
    fallbacks = dict.fromkeys(filter(None, (part.fallback for part in parts)))
    return Solution(quantized, "; ".join(fallbacks) or None, torch.cat(targets) if targets else None)


def decoded(solution: Solution, w: Tensor) -> Tensor:
    """What codes alone come to, on the device of a matrix."""
    return solution.quantized.decode().to(w.device)
