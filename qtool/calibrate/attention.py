"""What a rounded KV cache does to the attention of a block, measured on some calibration tokens.

Scores are compared as softmax weights, not as the products before: a number that is added to all products of a query
changes nothing, and errors at keys that nobody attends to cost nothing. Outputs are what the output projection reads,
so rounded values count as well. Both come from the model's own attention, with its masks, soft caps, sinks and grouped
heads: its weights are what it makes of values that are the identity.

Shape letters: S samples, A heads of keys and values, H heads of queries, T tokens, D numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.cache import RoundedCache
from qtool.calibrate.foreign import Handed, KVStore, misfit
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.numerics.metrics import energy, ratio_db

SAMPLES, LENGTH = 4, 256
"""Calibration tokens that are looked at; the weights of a head take S T^2 numbers."""


@dataclass(frozen=True)
class AttentionErrors:
    """Signal-to-error ratios of a block's attention, dB: of its softmax weights, and of its outputs."""

    scores_db: float
    outputs_db: float


class Weighing:
    """Lets attention give its weights as outputs: keys are rounded, if they are, and values are the identity.

    Args:
        cache: rounds keys; None: they are left alone.
    """

    def __init__(self, cache: RoundedCache | None) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with [S, A, T, D] each."""
        samples, heads, tokens, _width = keys.shape
        identity = torch.eye(tokens, dtype=values.dtype, device=values.device)
        rounded = self.cache.update(keys, values)[0] if self.cache else keys
        return rounded, identity.expand(samples, heads, -1, -1)


class Left(Exception):
    """Ends a block's forward pass behind its attention."""


def few(hidden: Hidden) -> Hidden:
    """The beginning of the first samples, copied before the block replaces them."""
    values = hidden[slice(SAMPLES)][:, :LENGTH]
    samples, length, width = values.shape
    part = Hidden(samples, length, width, values.dtype)
    part[slice(None)] = values
    part.tokens = None if hidden.tokens is None else hidden.tokens[:samples, :length].clone()
    return part


@torch.inference_mode()
def attention_errors(walker: Walker, block: nn.Module, i: int, hidden: Hidden, cache: RoundedCache) -> AttentionErrors:
    """Compares attention with a rounded cache to that with an exact one.

    Args:
        walker: over the model.
        block: from `walker.load_block(i)`, with the weights that it will have.
        i: its index.
        hidden: its inputs; see `few`.
        cache: how keys and values are rounded.
    """

    def error(exact: KVStore | None, rounded: KVStore) -> float:
        wanted, found = (attended(walker, block, i, hidden, store) for store in (exact, rounded))
        return ratio_db(energy(wanted), energy(wanted - found))

    return AttentionErrors(error(Weighing(None), Weighing(cache)), error(None, cache))


def attended(walker: Walker, block: nn.Module, i: int, hidden: Hidden, store: KVStore | None) -> Tensor:
    """What a block's output projection reads, float32 [S * T, all heads together]."""
    projection = next(m for m in walker.modules[i] if m.role == "o")
    seen: list[Tensor] = []

    def leave(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Left

    handed = Handed(store) if store else None
    hook = walker.linear(block, projection).register_forward_pre_hook(leave, prepend=True)
    try:
        walker.output(block, i, hidden, slice(None), handed)
    except Left:
        if handed:
            handed.check(block)
    finally:
        hook.remove()
    if not seen:
        raise misfit(block, f"did not run {projection.name}")
    return seen[0].flatten(0, -2).float()
