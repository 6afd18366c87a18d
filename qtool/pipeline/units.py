"""The steps of a run: a decoder block each, one module outside of them, or what is in one place beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from qtool.checkpoint.modules import BESIDE, place_of
from qtool.plan import LayerPlan, Plan
from qtool.recipe.cache import KVCache
from qtool.stats._base import Statistic
from qtool.stats.drift import Drift
from qtool.stats.values import Values


@dataclass(frozen=True)
class Unit:
    """What is finished and written in one step: a decoder block, or something outside of them.

    Attributes:
        name: "block-3", "model.embed_tokens", "mtp.layers.0".
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

    @property
    def blockwise(self) -> tuple[LayerPlan, ...]:
        """The modules of a decoder block whose method solves blocks."""
        return tuple(p for p in self.quantized if self.block is not None and p.method and p.method.first != p.method)

    @property
    def walked(self) -> bool:
        """True if calibration tokens have to reach it."""
        return bool(self.needs or self.blockwise)

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


def comparable(plans: tuple[LayerPlan, ...]) -> frozenset[type[Statistic]]:
    """What to measure on an input.

    Drift is left out where tokens go to other experts than in the unquantized model, and in front of down, whose input
    is so wide that its products would cost as much as all others, while KL divergence is the same without.
    """
    needs = needs_of(plans)
    drifts = all(p.module.role != "down" and p.module.expert is None for p in plans)
    return needs if drifts else needs - {Drift}


def units(plan: Plan) -> Iterator[Unit]:
    """The steps of a plan, in order."""

    def key(p: LayerPlan) -> tuple[str, int | None]:
        block = p.module.block
        if p.module.kind == BESIDE:
            return place_of(p.module.name), None
        return (p.module.name, None) if block is None else (f"block-{block}", block)

    for (name, block), layers in groupby(plan.layers, key):
        yield Unit(name, block, tuple(layers), None if block is None else cache_format(plan))


def cache_format(plan: Plan) -> KVCache | None:
    """Of keys and values; a smoke run leaves them alone, as it does most blocks."""
    return plan.recipe.kv_cache if plan.limited_blocks is None else None


def steps(plan: Plan) -> list[Unit]:
    """The units that a run goes through: those with something to quantize, and blocks that inputs flow through.

    A token embedding whose method measures what it reads as the output layer comes behind all blocks.
    """
    found = [unit for unit in units(plan) if unit.quantized or unit.block is not None]
    found.sort(key=lambda unit: any(p.module.kind == "embedding" and p.needs for p in unit.layers))
    last = max((i for i, unit in enumerate(found) if unit.quantized or unit.cache), default=-1)
    return found[: last + 1]
