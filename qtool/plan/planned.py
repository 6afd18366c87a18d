"""A model as a plan will leave it, of which everything is known but numbers: for asking artifacts how large it gets."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from qtool.checkpoint._base import Cache, Checkpoint, QuantizedCheckpoint, Static, TensorInfo
from qtool.plan.layers import Plan
from qtool.recipe.cache import KVCache
from qtool.store.neutral import KEEP

SOME = Static(1.0)
"""Stands for what calibration will find."""


class Planned(QuantizedCheckpoint):
    """What a run will write, before it has begun; `names`, `info`, `layers` and `cache` say how it will be stored.

    Args:
        source: the model.
        plan: for it.
    """

    def __init__(self, source: Checkpoint, plan: Plan) -> None:
        self._origin = source
        self.source, self.config, self.family, self.files = source.source, source.config, source.family, source.files
        layers = {p.module.name: p.layer for p in plan.layers if p.layer}
        self.layers = {name: replace(x, static=SOME) if x.unmeasured else x for name, x in layers.items()}
        self._casts = {f"{p.module.name}.weight": KEEP[p.keep] for p in plan.layers if p.keep in KEEP}
        fmt = plan.recipe.kv_cache if plan.limited_blocks is None else None
        self.cache = self._cached(fmt) if fmt else None

    def _cached(self, fmt: KVCache) -> Cache:
        """How the KV cache will be rounded."""
        _, heads, width = self.family.heads(self.config)
        keys, values = ((SOME,) * count for count in fmt.counts(heads, width))
        blocks = range(self.family.blocks(self.config)) if fmt.static else ()
        return Cache(fmt, dict.fromkeys(blocks, (keys, values)))

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._origin.names()

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`; casts are made."""
        info = self._origin.info(name)
        return TensorInfo(info.shape, self._casts.get(name, info.dtype))

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`: that of the model."""
        return self._origin.fingerprint()

    def tensor(self, name: str) -> NoReturn:
        """Nothing has been computed. Raises RuntimeError."""
        raise RuntimeError(f"{name} is only planned")

    def matrix(self, module: str) -> NoReturn:
        """Nothing has been computed. Raises RuntimeError."""
        raise RuntimeError(f"{module} is only planned")
