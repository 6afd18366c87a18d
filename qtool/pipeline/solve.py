"""One module at a time: solve, check, measure. Both the data-free and the calibrated path come through here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint
from qtool.errors import NumericsError
from qtool.formats._base import Format, Quantized
from qtool.methods._base import Solution
from qtool.numerics.metrics import all_finite
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.parallel import row_shares, shares, side_by_side
from qtool.pipeline.correct import correct, joined
from qtool.pipeline.entries import Sums
from qtool.pipeline.found import Found
from qtool.pipeline.requantize import StoredMatrix, origin
from qtool.pipeline.rows import ON_DEVICE, row_groups, row_parts
from qtool.plan import LayerPlan
from qtool.residuals._base import Correction
from qtool.stats._base import InputStats
from qtool.stats.gram import gram_of

SMALL = 1 << 20
"""Numbers of a matrix up to which a memory-bound format takes no longer than waking threads for its rows."""
TAKEN_OVER = "taken over"
"""What the report calls the method where a source's own codes are kept."""


def solve(
    plan: LayerPlan,
    checkpoint: Checkpoint,
    stats: InputStats | None,
    device: torch.device,
    merged: Sequence[str] = (),
    rows: tuple[int, int] | None = None,
    weight: Tensor | None = None,
) -> Found:
    """Quantizes some rows of one module; many of them in parts, if nothing ties them together.

    Args:
        plan: with a format and a method.
        checkpoint: where its weight is.
        stats: of its input; None without data. Groups of rows that weigh tokens otherwise are solved one by one.
        device: where to compute, and where codes and parameters stay.
        merged: modules that share what is chosen for a whole matrix; see `Unit.merged`.
        rows: (start, stop); None: all of them, as has to be where they are `tied`.
        weight: [N, K] on the device, where it is at hand as the checkpoint has it; None: read it.

    Raises:
        NumericsError: the result is not finite.
    """
    assert plan.format is not None
    assert plan.method is not None
    name, method = plan.module.name, plan.method
    first, last = rows or (0, plan.module.shape[0])
    fmt = informed(plan.format, checkpoint, merged or (name,))
    blind = "chosen without data: nothing was measured on its inputs" if stats is None and method.needs else None
    lost = "corrected without data" if stats is None and any(r.needs for r in plan.residuals) else None
    views = stats.of(name) if stats and plan.weight_needs else ()
    stats = views[0] if views else None
    source = origin(checkpoint, name, plan.format, plan.residuals)
    codes = torch.empty(last - first, plan.module.shape[1], dtype=torch.uint8, device=device)
    params, sums, seconds = [], Sums(), 0.0
    remarks, start = [plan.fallback, blind, lost, source.remark], 0
    corrections: tuple[Correction, ...] = ()
    at_once = source.same is None and (gram_of(stats) is not None or not fmt.by_rows)
    whole, times = at_once or bool(plan.residuals), 1 if device.type == "cpu" else ON_DEVICE
    for a, b in [(0, len(codes))] if whole else row_parts(codes.shape, times):
        part = first + a, first + b
        with marked("weights read"):  # the bus carries the narrower type
            w = weight[slice(*part)] if weight is not None else read(checkpoint, source, name, *part).to(device)
            w = w.float()
        begin = time.monotonic()
        same = source.same and source.same.rows(*part)
        solved = take_over(w, same) if same else solve_groups(plan, fmt, w, views, first + a)
        if plan.residuals:
            solved, corrections = corrected(plan, fmt, w, solved, stats, same is None)
        for solution, squares in solved:
            stop = start + len(solution.quantized.codes)
            codes[start:stop] = solution.quantized.codes
            params.append({key: p.to(device) for key, p in solution.quantized.params.items()})
            remarks.append(solution.fallback)
            sums, start = sums + squares, stop
        seconds += time.monotonic() - begin
    joined = {key: torch.cat([part[key] for part in params]) for key in params[0]}
    quantized = Quantized(codes, joined, source.same.format if source.same else plan.format)
    how = TAKEN_OVER if source.same or (corrections and complete(fmt, sums)) else method.name()
    return Found(quantized, corrections, sums, how, tuple(remarks), seconds)


def complete(fmt: Format, sums: Sums) -> bool:
    """True if codes say nothing of a matrix, and what is beside them all of it."""
    return len(fmt.levels()) == 1 and sums.error == 0


def tied(plan: LayerPlan) -> bool:
    """True if the rows of a module are solved together, whoever does it."""
    return plan.format is None or not plan.format.by_rows or bool(plan.residuals)


def read(checkpoint: Checkpoint, source: StoredMatrix, module: str, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a weight."""
    if source.stored:
        return source.stored.rows(start, stop).decode()
    return checkpoint.rows(f"{module}.weight", start, stop)


def take_over(w: Tensor, same: Quantized) -> list[tuple[Solution, Sums]]:
    """Some rows whose codes the source has already, on all threads.

    Args:
        w: float32 [rows, K].
        same: their codes.
    """

    def compare(part: tuple[int, int]) -> tuple[Solution, Sums]:
        rows = same.rows(*part)
        return Solution(rows), Sums.of(w[slice(*part)], rows.decode().to(w.device), None)

    return side_by_side(compare, parts := row_shares(len(w), w.device), shares(len(parts), w.device))


def solve_groups(
    plan: LayerPlan, fmt: Format, w: Tensor, views: Sequence[InputStats], first: int
) -> list[tuple[Solution, Sums]]:
    """Quantizes some rows of a module, from its row `first` on; groups that weigh tokens otherwise one by one.

    Without views that goes without data.
    """
    shares = row_groups(plan.module.shape[0], views or (None,), first, first + len(w))
    return [found for stats, part in shares for found in solve_rows(plan, fmt, w[part], stats)]


def solve_rows(plan: LayerPlan, fmt: Format, w: Tensor, stats: InputStats | None) -> list[tuple[Solution, Sums]]:
    """Quantizes some rows of a module and compares, on all threads where rows have nothing to do with each other.

    Args:
        plan: with a method.
        fmt: see `informed`.
        w: float32 [rows, K].
        stats: see `solve`.

    Raises:
        NumericsError: the result is not finite.
    """
    method, gram = plan.method, gram_of(stats)
    assert method is not None

    def solve_part(part: tuple[int, int]) -> tuple[Solution, Sums]:
        rows = w[slice(*part)]
        with marked("solving"):
            solution = method.solve(rows, stats, fmt)
        with marked("errors"):
            w_hat = solution.quantized.decode().to(w.device)
            refuse_infinite(w_hat, plan)
            return solution, Sums.of(rows, w_hat, gram, solution.target)

    with naming(plan.module.name):
        if stats:
            with marked("factors"):
                method.prepare(stats, fmt)
        parts = rows_abreast(w, fmt, gram)
        return side_by_side(solve_part, parts, shares(len(parts), w.device))


def corrected(
    plan: LayerPlan, fmt: Format, w: Tensor, solved: list[tuple[Solution, Sums]], stats: InputStats | None, free: bool
) -> tuple[list[tuple[Solution, Sums]], tuple[Correction, ...]]:
    """Finds what is kept beside the codes of a whole matrix, and compares anew.

    Args:
        plan: with residuals.
        fmt: see `informed`.
        w: float32 [N, K].
        solved: its codes.
        stats: see `solve`.
        free: whether other codes may be chosen for what the corrections leave.

    Raises:
        NumericsError: the result is not finite.
    """

    def again(rest: Tensor) -> list[Solution]:
        return [solution for solution, _ in solve_rows(plan, fmt, rest, stats)]

    turns = max(residual.turns for residual in plan.residuals) if free else 0
    gram, first = gram_of(stats), joined([solution for solution, _ in solved])
    solution, found = correct(plan.residuals, w, gram, first, again, turns)
    w_hat = solution.quantized.decode().to(w.device)
    for correction in found:
        w_hat = correction.apply(w_hat)
    refuse_infinite(w_hat, plan)
    corrections = tuple(Correction(c.residual, {name: t.cpu() for name, t in c.tensors.items()}) for c in found)
    return [(solution, Sums.of(w, w_hat, gram, solution.target))], corrections


def rows_abreast(w: Tensor, fmt: Format, gram: Tensor | None) -> list[tuple[int, int]]:
    """(start, stop) of the rows that are solved side by side: float32 [rows, K], with the inputs' [K, K] or without."""
    whole = not fmt.by_rows or (fmt.memory_bound and gram is None and w.numel() <= SMALL)
    return [(0, len(w))] if whole else row_shares(len(w), w.device)


def informed(fmt: Format, checkpoint: Checkpoint, modules: Sequence[str]) -> Format:
    """A format that knows the largest weight of some modules, if it wants to."""
    if not fmt.needs_largest:
        return fmt
    parts = ((f"{m}.weight", *part) for m in modules for part in row_parts(checkpoint.info(f"{m}.weight").shape))
    return fmt.with_largest(max(float(checkpoint.rows(*part).abs().max()) for part in parts))


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Lets a NumericsError say of which module it is."""
    try:
        yield
    except NumericsError as error:
        if module in str(error):
            raise
        raise NumericsError(f"{module}: {error}") from error


def refuse_infinite(w_hat: Tensor, plan: LayerPlan) -> None:
    """Raises NumericsError: a method's result is not finite."""
    assert plan.format is not None
    assert plan.method is not None
    if not all_finite(w_hat):
        raise NumericsError(
            f"{plan.method.name()} made {plan.module.name} infinite or NaN in {plan.format.label}",
            hint="choose another method or format for it",
        )
