"""One module at a time: solve, check, measure. Both the data-free and the calibrated path come through here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from qtool.checkpoint._base import Checkpoint, finite
from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.numerics.metrics import output_error_db, sqnr_db
from qtool.plan import LayerPlan, Plan
from qtool.report.model import LayerEntry
from qtool.stats import InputStats, Stat


@dataclass(frozen=True)
class Unit:
    """What is finished and written in one step: a decoder block, or one module outside of them.

    Attributes:
        name: "block-3", "model.embed_tokens".
        block: index of the decoder block; None outside.
        layers: its modules, in order.
    """

    name: str
    block: int | None
    layers: tuple[LayerPlan, ...]

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The modules that get a format."""
        return tuple(p for p in self.layers if p.format)

    @property
    def needs(self) -> frozenset[Stat]:
        """Everything that its methods want measured."""
        return frozenset[Stat]().union(*(p.method.needs for p in self.layers if p.method))


def units(plan: Plan) -> Iterator[Unit]:
    """The steps of a plan, in order."""

    def key(p: LayerPlan) -> tuple[str, int | None]:
        block = p.module.block
        return (p.module.name, None) if block is None else (f"block-{block}", block)

    for (name, block), layers in groupby(plan.layers, key):
        yield Unit(name, block, tuple(layers))


def solve(
    plan: LayerPlan, checkpoint: Checkpoint, stats: InputStats | None, device: torch.device
) -> tuple[Quantized, LayerEntry]:
    """Quantizes one module.

    Args:
        plan: with a format and a method.
        checkpoint: where its weight is.
        stats: of its input; None without data.
        device: where to compute.

    Raises:
        NumericsError: the result is not finite.
    """
    assert plan.format is not None
    assert plan.method is not None
    w = checkpoint.tensor(f"{plan.module.name}.weight").to(device, torch.float32)
    stats = stats if plan.method.needs else None
    begin = time.monotonic()
    solution = plan.method.solve(w, stats, plan.format)
    seconds = time.monotonic() - begin
    w_hat = solution.quantized.decode()
    if not bool(torch.isfinite(w_hat).all()):
        raise NumericsError(
            f"{plan.method.name()} made {plan.module.name} infinite or NaN in {plan.format.label}",
            hint="choose another method or format for it",
        )
    gram = stats.gram if stats else None
    codes, params, fmt = solution.quantized
    return Quantized(codes.cpu(), {name: p.cpu() for name, p in params.items()}, fmt), LayerEntry(
        name=plan.module.name,
        role=plan.module.role,
        block=plan.module.block,
        shape=plan.module.shape,
        format=fmt.label,
        method=plan.method.name(),
        activations=plan.activations.label if plan.activations else None,
        bits_per_weight=plan.bits / w.numel(),
        nbytes=plan.bits // 8,
        weight_error_db=sqnr_db(w, w_hat),
        output_error_db=None if gram is None else output_error_db(w, w_hat, gram),
        tokens=stats.tokens if stats else 0,
        fallback="; ".join(filter(None, (plan.fallback, solution.fallback))) or None,
        seconds=seconds,
    )


def kept(plan: LayerPlan) -> LayerEntry:
    """The report's entry of a module without a format."""
    n, k = plan.module.shape
    return LayerEntry(
        name=plan.module.name,
        role=plan.module.role,
        block=plan.module.block,
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


def refuse_non_finite(checkpoint: Checkpoint) -> None:
    """Reads every tensor once.

    Raises:
        NumericsError: one holds NaN or infinity.
    """
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if not math.isfinite(tensor.sum(dtype=torch.float32)):  # quicker than a look at each number, and as strict
            finite(tensor, name)


def mean_db(entries: Sequence[LayerEntry]) -> float | None:
    """Mean error of layers, of their outputs where these were measured; exact layers are left out."""
    errors = (e.weight_error_db if e.output_error_db is None else e.output_error_db for e in entries)
    found = [e for e in errors if e is not None and math.isfinite(e)]
    return sum(found) / len(found) if found else None
