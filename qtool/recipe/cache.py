"""The KV cache in a recipe: `kv_cache: fp8-tensor`, or `kv_cache: {keys: int4-channel, values: int4-token}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from qtool.formats._base import Format
from qtool.formats._spelling import parse_format, spelled_out
from qtool.problems import checked, mistake
from qtool.recipe.strict import Strict


def _parse_side(value: Any) -> Format:
    fmt = parse_format(value)
    if fmt.granularity is None:
        wanted = "one scale per tensor, head, channel or token, such as fp8-head or int4-token"
        raise mistake("no format of a KV cache", wanted=wanted, found=fmt.label)
    if fmt.granularity == "token" and not isinstance(fmt.ranges, str):
        wanted = "minmax or search; percentages are for scales that hold for all tokens (group: tensor, head, channel)"
        raise mistake(f"scales of a {fmt.label} KV cache", wanted=wanted, found=fmt.ranges)
    usual = {} if fmt.granularity == "token" or "scales" in fmt.model_fields_set else {"scales": "minmax"}
    return fmt.model_copy(update=usual)


def _dump_side(fmt: Format) -> Any:
    return fmt.label if _parse_side(fmt.label) == fmt else spelled_out(fmt)


Side = Annotated[Format, BeforeValidator(_parse_side), PlainSerializer(_dump_side)]


class KVCache(Strict):
    """Formats of keys and of values in the KV cache.

    One scale of fp8-tensor is for all numbers of a block, one of fp8-head for a head, and one of int4-channel for a
    channel of a head; calibration finds these. With int4-token, every token's heads are rounded by themselves.

    Scales cover everything that calibration saw unless `scales` says otherwise: the largest keys are often those of
    tokens that all others attend to, and ranges with the least squared error clip them (with 4-bit keys per channel,
    attention scores of SmolLM2-135M are 5 dB worse so).

    Attributes:
        keys: the format of keys, behind the rotary embedding.
        values: the format of values.
    """

    keys: Side
    values: Side

    @property
    def label(self) -> str:
        """What to call it: a format, or two."""
        same = self.keys == self.values
        return self.keys.label if same else f"{self.keys.label} keys and {self.values.label} values"

    @property
    def static(self) -> bool:
        """True if calibration has to find scales."""
        return {self.keys.granularity, self.values.granularity} != {"token"}


def either(value: Any) -> Any:
    """What `KVCache` is made from, where a format stands for both."""
    if isinstance(value, KVCache) or (isinstance(value, Mapping) and "type" not in value):
        return value
    fmt = _parse_side(value)
    return {"keys": fmt, "values": fmt}


def parse_cache(value: Any) -> KVCache:
    """A format, or a mapping of two. Raises ValueError: neither."""
    found: KVCache = checked(KVCache, either(value))
    return found


def dump_cache(cache: KVCache) -> Any:
    """What `parse_cache` reads back as an equal one."""
    keys, values = _dump_side(cache.keys), _dump_side(cache.values)
    return keys if keys == values else {"keys": keys, "values": values}
