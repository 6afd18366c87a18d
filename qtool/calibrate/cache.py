"""Stands in for the KV cache of a model that is run without one: measures keys and values, or rounds them.

Attention hands its keys, behind the rotary embedding, and values to a cache and goes on with what the cache returns.
Scales per channel of keys are what KIVI (https://arxiv.org/abs/2402.02750) and KVQuant
(https://arxiv.org/abs/2401.18079) found keys to need: few channels hold their large numbers, in every token.

Shape letters: S samples, A heads of keys and values, T tokens, D numbers of a head, R scales.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from qtool.calibrate.inputs import fit_static, quantize_rows, quantize_tokens
from qtool.checkpoint._base import CacheScales, Checkpoint, QuantizedCheckpoint, Static
from qtool.formats._base import Format
from qtool.numerics.hadamard import transform
from qtool.numerics.histogram import BINS, Histogram
from qtool.numerics.threads.ranks import Ranks
from qtool.recipe.cache import KVCache

ORDERS = {"tensor": (0, (0, 1, 2, 3)), "head": (1, (1, 0, 2, 3)), "channel": (2, (1, 3, 0, 2))}
"""By what shares a scale: how many dimensions scales differ along, and [S, A, T, D] with these in front."""
CHANNEL_BINS = BINS // 4
"""For channels, which are many; 8-bit codes share at least 4 bins each."""


def in_rows(x: Tensor, granularity: str) -> Tensor:
    """[S, A, T, D] -> [R, numbers that share a scale]."""
    count, order = ORDERS[granularity]
    first = x.permute(order)
    return first.reshape(math.prod(first.shape[:count]), -1)


def from_rows(rows: Tensor, granularity: str, like: Tensor) -> Tensor:
    """The inverse of `in_rows`."""
    _, order = ORDERS[granularity]
    return rows.view(like.permute(order).shape).permute(tuple(map(order.index, range(4))))


def quantize_cached(x: Tensor, fmt: Format, statics: tuple[Static, ...]) -> Tensor:
    """Rounds keys or values, [S, A, T, D], as they enter the cache: -> same shape and dtype."""
    if fmt.granularity not in ORDERS:
        return quantize_tokens(x, fmt)
    return from_rows(quantize_rows(in_rows(x, fmt.granularity), fmt, statics), fmt.granularity, x)


def turned(keys: Tensor, fmt: KVCache) -> Tensor:
    """Keys, [S, A, T, D], through Hadamard matrices, float32 if there are some; turned twice they are as they were."""
    return keys if fmt.hadamard is None else transform(keys.float(), fmt.hadamard)


class MeteredCache:
    """Gives back what it is handed, and counts what calibration has to know of it.

    Args:
        fmt: of the cache.
    """

    def __init__(self, fmt: KVCache) -> None:
        self.format, self.formats = fmt, (fmt.keys, fmt.values)
        self.found: list[Histogram | None] = [None, None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with [S, A, T, D] each."""
        for i, (x, fmt) in enumerate(zip((turned(keys, self.format), values), self.formats, strict=True)):
            if fmt.granularity in ORDERS:
                rows = in_rows(x, fmt.granularity)
                bins = CHANNEL_BINS if fmt.granularity == "channel" else BINS
                found = self.found[i] = self.found[i] or Histogram(len(rows), bins)
                found.add(rows)
        return keys, values

    def combine(self, ranks: Ranks) -> None:
        """Adds what other processes counted, by rank; afterwards all of them have the same."""
        if ranks.size == 1:
            return
        self.found, *others = ranks.gather(self.found)
        for found in others:
            for i, theirs in enumerate(found):
                mine = self.found[i]
                if mine and theirs:
                    mine.merge(theirs)
                self.found[i] = mine or theirs

    def scales(self) -> CacheScales:
        """Chosen by what was counted."""
        keys, values = (
            fit_static(seen, fmt) if seen else () for seen, fmt in zip(self.found, self.formats, strict=True)
        )
        return keys, values


class RoundedCache:
    """Gives back what a runtime reads from its cache; keys that it turns, turned back instead of the queries.

    Args:
        fmt: how numbers are rounded.
        scales: those of one decoder block.
    """

    def __init__(self, fmt: KVCache, scales: CacheScales) -> None:
        self.format, self.scales = fmt, scales

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with [S, A, T, D] each."""
        of_keys, of_values = self.scales
        read = turned(quantize_cached(turned(keys, self.format), self.format.keys, of_keys), self.format).to(keys.dtype)
        return read, quantize_cached(values, self.format.values, of_values)


def rounded_cache(checkpoint: Checkpoint, block: int) -> RoundedCache | None:
    """That of a checkpoint's block; None if it is not rounded."""
    cache = checkpoint.cache if isinstance(checkpoint, QuantizedCheckpoint) else None
    return RoundedCache(cache.format, cache.statics.get(block, ((), ()))) if cache else None
