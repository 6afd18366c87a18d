"""Stands in for the KV cache of a model that is run without one: measures keys and values, or rounds them.

Attention hands its keys, behind the rotary embedding, and values to a cache and goes on with what the cache returns.

Shape letters: S samples, A heads of keys and values, T tokens, D numbers of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qtool.calibrate.inputs import quantize_static, quantize_tokens
from qtool.checkpoint._base import Cache, Checkpoint, QuantizedCheckpoint
from qtool.numerics.histogram import Histogram


class MeteredCache:
    """Gives back what it is handed.

    Attributes:
        keys, values: of all tokens that came by.
    """

    def __init__(self) -> None:
        self.keys, self.values = Histogram(), Histogram()

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with [S, A, T, D] each."""
        self.keys.add(keys)
        self.values.add(values)
        return keys, values


class RoundedCache:
    """Gives back what a runtime reads from its cache.

    Args:
        cache: how numbers are rounded.
        block: index of the decoder block that it belongs to.
    """

    def __init__(self, cache: Cache, block: int) -> None:
        self.format, self.statics = cache.format, cache.statics.get(block)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with [S, A, T, D] each."""
        if self.statics is None:
            return quantize_tokens(keys, self.format), quantize_tokens(values, self.format)
        of_keys, of_values = self.statics
        return quantize_static(keys, self.format, of_keys), quantize_static(values, self.format, of_values)


def rounded_cache(checkpoint: Checkpoint, block: int) -> RoundedCache | None:
    """That of a checkpoint's block; None if it is not rounded."""
    cache = checkpoint.cache if isinstance(checkpoint, QuantizedCheckpoint) else None
    return RoundedCache(cache, block) if cache else None
