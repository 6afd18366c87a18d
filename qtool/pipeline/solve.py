"""One module at a time: solve, check, measure. Both the data-free and the calibrated path come through here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint
from qtool.errors import NumericsError
from qtool.formats._base import Format, Quantized
from qtool.methods._base import Solution
from qtool.numerics.metrics import all_finite, energy, ratio_db
from qtool.numerics.threads.parallel import row_shares, shares, side_by_side
from qtool.pipeline.requantize import origin
from qtool.plan import LayerPlan, Plan
from qtool.recipe.cache import KVCache
from qtool.report.model import LayerEntry
from qtool.residuals._base import Matrix
from qtool.stats._base import InputStats, Statistic
from qtool.stats.gram import gram_of
from qtool.stats.values import Values

PART = 1 << 22
"""Numbers of a large matrix that are worked on at a time: 16 MiB in float32, and a few such temporaries."""
SMALL = 1 << 20
"""Numbers of a matrix up to which a light format takes no longer than waking threads for its rows."""
TAKEN_OVER = "taken over"
"""What the report calls the method where a source's own codes are kept."""


@dataclass(frozen=True)
class Unit:
    """What is finished and written in one step: a decoder block, or one module outside of them.

    Attributes:
        name: "block-3", "model.embed_tokens".
        block: index of the decoder block; None outside.
        layers: its modules, in order.
        cache: format of its keys and values; None: left alone.
    """

    name: str
    block: int | None
    layers: tuple[LayerPlan, ...]
    cache: KVCache | None = None

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The modules that get a format."""
        return tuple(p for p in self.layers if p.format)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Everything that has to be measured for it."""
        cached = {Values} if self.cache and self.cache.static else set()
        return needs_of(self.layers) | cached

    def inputs(self) -> dict[str, tuple[LayerPlan, ...]]:
        """The modules that get a format, by the input that they read."""
        readers: dict[str, tuple[LayerPlan, ...]] = {}
        for p in self.quantized:
            readers[p.module.reads] = (*readers.get(p.module.reads, ()), p)
        return readers

    def merged(self, plan: LayerPlan) -> tuple[str, ...]:
        """Modules that runtimes merge with one of them into one matrix, itself among them."""
        names = [p.module.name for p in self.layers if p.module.fused == plan.module.fused]
        return tuple(names) if plan.module.fused else (plan.module.name,)


def needs_of(plans: Iterable[LayerPlan]) -> frozenset[type[Statistic]]:
    """Everything that has to be measured for some modules."""
    return frozenset[type[Statistic]]().union(*(p.needs for p in plans))


def units(plan: Plan) -> Iterator[Unit]:
    """The steps of a plan, in order."""

    def key(p: LayerPlan) -> tuple[str, int | None]:
        block = p.module.block
        return (p.module.name, None) if block is None else (f"block-{block}", block)

    for (name, block), layers in groupby(plan.layers, key):
        yield Unit(name, block, tuple(layers), None if block is None else cache_format(plan))


def cache_format(plan: Plan) -> KVCache | None:
    """Of keys and values; a smoke run leaves them alone, as it does most blocks."""
    return plan.recipe.kv_cache if plan.limited_blocks is None else None


def solve(
    plan: LayerPlan,
    checkpoint: Checkpoint,
    stats: InputStats | None,
    device: torch.device,
    merged: Sequence[str] = (),
) -> tuple[Matrix, LayerEntry]:
    """Quantizes one module; a large matrix in parts, if nothing ties its rows together.

    Args:
        plan: with a format and a method.
        checkpoint: where its weight is.
        stats: of its input; None without data.
        device: where to compute.
        merged: modules that share what is chosen for a whole matrix; see `Unit.merged`.

    Raises:
        NumericsError: the result is not finite.
    """
    assert plan.format is not None
    assert plan.method is not None
    fmt = informed(plan.format, checkpoint, merged or (plan.module.name,))
    missing = stats is None and plan.method.needs
    unmeasured = "chosen without data: nothing was measured on its inputs" if missing else None
    stats = stats if plan.method.needs else None
    gram = gram_of(stats)
    weight = f"{plan.module.name}.weight"
    source, held, remark = origin(checkpoint, plan.module.name, plan.format)
    divisible = held is not None or (fmt.by_rows and gram is None)
    codes = torch.empty(plan.module.shape, dtype=torch.uint8)
    sums, params, fallbacks, seconds = Sums(), [], {plan.fallback: None, unmeasured: None, remark: None}, 0.0
    for start, stop in row_parts(plan.module.shape) if divisible else [(0, plan.module.shape[0])]:
        given = source.rows(start, stop).decode() if source else checkpoint.rows(weight, start, stop)
        w = given.to(device, torch.float32)
        begin = time.monotonic()
        for solution, part in solve_rows(plan, fmt, w, held.rows(start, stop) if held else None, stats):
            count = len(solution.quantized.codes)
            codes[start : start + count] = solution.quantized.codes
            params.append({name: p.cpu() for name, p in solution.quantized.params.items()})
            fallbacks[solution.fallback] = None
            sums += part
            start += count
        seconds += time.monotonic() - begin
    entry = kept(plan).model_copy(
        update={
            "format": plan.format.label,
            "method": TAKEN_OVER if held else plan.method.name(),
            "activations": plan.activations.label if plan.activations else None,
            "weight_error_db": ratio_db(sums.signal, sums.error),
            "output_error_db": None if gram is None else ratio_db(sums.output, sums.output_error),
            "target_error_db": ratio_db(sums.output, sums.target_error) if sums.aimed_elsewhere else None,
            "tokens": stats.tokens if stats else 0,
            "fallback": "; ".join(filter(None, fallbacks)) or None,
            "seconds": seconds,
        }
    )
    joined = {name: torch.cat([part[name] for part in params]) for name in params[0]}
    return Matrix(Quantized(codes, joined, held.format if held else plan.format)), entry


def solve_rows(
    plan: LayerPlan, fmt: Format, w: Tensor, held: Quantized | None, stats: InputStats | None
) -> list[tuple[Solution, Sums]]:
    """Quantizes some rows of a module and compares, on all threads where rows have nothing to do with each other.

    Args:
        plan: with a method.
        fmt: see `informed`.
        w: float32 [rows, K].
        held: the codes of these rows, if they are to be taken over.
        stats: see `solve`.

    Raises:
        NumericsError: the result is not finite.
    """
    method, gram = plan.method, gram_of(stats)
    assert method is not None

    def solve_part(part: tuple[int, int]) -> tuple[Solution, Sums]:
        rows = w[slice(*part)]
        solution = Solution(held.rows(*part)) if held else method.solve(rows, stats, fmt)
        w_hat = solution.quantized.decode().to(w.device)
        refuse_infinite(w_hat, plan)
        return solution, Sums.of(rows, w_hat, gram, solution.target)

    if stats and not held:
        method.prepare(stats, fmt)
    parts = row_shares(len(w), w.device) if held else rows_abreast(w, fmt, gram)
    return side_by_side(solve_part, parts, shares(len(parts), w.device))


def rows_abreast(w: Tensor, fmt: Format, gram: Tensor | None) -> list[tuple[int, int]]:
    """(start, stop) of the rows that are solved side by side: float32 [rows, K], with the inputs' [K, K] or without."""
    whole = not fmt.by_rows or (fmt.light and gram is None and w.numel() <= SMALL)
    return [(0, len(w))] if whole else row_shares(len(w), w.device)


def informed(fmt: Format, checkpoint: Checkpoint, modules: Sequence[str]) -> Format:
    """A format that knows the largest weight of some modules, if it wants to."""
    if not fmt.needs_largest:
        return fmt
    parts = ((f"{m}.weight", *part) for m in modules for part in row_parts(checkpoint.info(f"{m}.weight").shape))
    return fmt.given(max(float(checkpoint.rows(*part).abs().max()) for part in parts))


def kept(plan: LayerPlan) -> LayerEntry:
    """The report's entry of a module without a format."""
    n, k = plan.module.shape
    return LayerEntry(
        name=plan.module.name,
        role=plan.module.role,
        block=plan.module.block,
        expert=plan.module.expert,
        shape=plan.module.shape,
        format=None,
        method=None,
        activations=None,
        bits_per_weight=plan.bits / (n * k),
        nbytes=plan.bits // 8,
        weight_error_db=None,
        output_error_db=None,
        tokens=0,
        fallback=plan.fallback,
        seconds=0.0,
    )


@dataclass
class Sums:
    """Squares of a matrix, of its error, and of the outputs of both; grown part by part.

    Attributes:
        signal, error: of W and W - W_hat.
        output, output_error: of their outputs.
        target_error: of the outputs of T - W_hat, where the method aimed at T, which is W unless it says otherwise.
    """

    signal: float = 0.0
    error: float = 0.0
    output: float = 0.0
    output_error: float = 0.0
    target_error: float = 0.0

    @classmethod
    def of(cls, w: Tensor, w_hat: Tensor, gram: Tensor | None, target: Tensor | None = None) -> Sums:
        """Those of some rows, [rows, K]; outputs are known from the Gram matrix of the inputs, [K, K]."""
        if gram is None:
            return cls(energy(w), energy(w - w_hat))
        error = energy(w - w_hat, gram)
        aimed = error if target is None or target is w else energy(target - w_hat, gram)
        return cls(energy(w), energy(w - w_hat), energy(w, gram), error, aimed)

    @property
    def aimed_elsewhere(self) -> bool:
        """True if the method aimed at another matrix than W."""
        return self.target_error != self.output_error

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def row_parts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts in which a large matrix is worked on."""
    rows, step = shape[0], max(1, PART // math.prod(shape[1:]))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def refuse_infinite(w_hat: Tensor, plan: LayerPlan) -> None:
    """Raises NumericsError: a method's result is not finite."""
    assert plan.format is not None
    assert plan.method is not None
    if not all_finite(w_hat):
        raise NumericsError(
            f"{plan.method.name()} made {plan.module.name} infinite or NaN in {plan.format.label}",
            hint="choose another method or format for it",
        )


def mean_db(entries: Sequence[LayerEntry]) -> float | None:
    """Mean error of layers, of their outputs where these were measured; exact layers are left out."""
    errors = (e.weight_error_db if e.output_error_db is None else e.output_error_db for e in entries)
    found = [e for e in errors if e is not None and math.isfinite(e)]
    return sum(found) / len(found) if found else None
