"""The KV cache in a recipe: `kv_cache: fp8-tensor`, or `kv_cache: {keys: int4-channel, values: int4-token}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, field_validator

from qtool.formats._base import Format
from qtool.formats._spelling import parse_format, spelled_out
from qtool.problems import checked, mistake
from qtool.recipe.strict import Strict

STATIC = ("tensor", "head", "channel")
"""What shares scales that calibration finds."""


def _parse_side(value: Any) -> Format:
    fmt = parse_format(value)
    if fmt.granularity is None and (fmt.group_columns is None or fmt.group_rows != 1 or fmt.needs_largest):
        wanted = "scales per tensor, head, channel or token, or of groups in a head, as fp8-head, int4-token, bfp4-g16"
        raise mistake("no format of a KV cache", wanted=wanted, found=fmt.label)
    if fmt.granularity not in STATIC and not isinstance(fmt.ranges, str):
        wanted = "minmax or search; percentages are for scales that hold for all tokens (group: tensor, head, channel)"
        raise mistake(f"scales of a {fmt.label} KV cache", wanted=wanted, found=fmt.ranges)
    usual = {} if fmt.granularity not in STATIC or "scales" in fmt.model_fields_set else {"scales": "minmax"}
    return fmt.model_copy(update=usual)


def _dump_side(fmt: Format) -> Any:
    return fmt.label if _parse_side(fmt.label) == fmt else spelled_out(fmt)


Side = Annotated[Format, BeforeValidator(_parse_side), PlainSerializer(_dump_side)]


class KVCache(Strict):
    """Formats of keys and of values in the KV cache.

    One scale of fp8-tensor is for all numbers of a block, one of fp8-head for a head, and one of int4-channel for a
    channel of a head; calibration finds these. With int4-token, every token's heads are rounded by themselves, and with
    groups, such as bfp4-g16, runs of a head's channels are.

    Scales cover everything that calibration saw unless `scales` says otherwise: the largest keys are often those of
    tokens that all others attend to, and ranges with the least squared error clip them (with 4-bit keys per channel,
    attention scores of SmolLM2-135M are 5 dB worse so).

    What few channels of keys hold may be spread over runs of them by Hadamard matrices at run time, which queries go
    through as well, so that products stay (QuaRot, https://arxiv.org/abs/2404.00456). Values are turned without a trace
    by the transform `rotate` at heads.

    Attributes:
        keys: the format of keys, behind the rotary embedding.
        values: the format of values.
        hadamard: channels of a run of keys that is multiplied with a Hadamard matrix before it is rounded, a power of
            two that divides a head; null: keys are rounded as they are.
    """

    keys: Side
    values: Side
    hadamard: int | None = None

    @field_validator("hadamard")
    @classmethod
    def _power(cls, run: int | None) -> int | None:
        if run is not None and (run < 2 or run & (run - 1)):
            raise mistake("no run of keys", wanted="a power of two, such as 16, 32, 64 or 128", found=run)
        return run

    @property
    def label(self) -> str:
        """What to call it: a format, or two."""
        same = self.keys == self.values and self.hadamard is None
        return self.keys.label if same else f"{self.of_keys} keys and {self.values.label} values"

    @property
    def of_keys(self) -> str:
        """What becomes of keys: a format, and what is in front of it."""
        return (
            self.keys.label
            if self.hadamard is None
            else f"Hadamard matrices of {self.hadamard}, then {self.keys.label}"
        )

    @property
    def static(self) -> bool:
        """True if calibration has to find scales."""
        return self.keys.granularity in STATIC or self.values.granularity in STATIC

    def counts(self, heads: int, width: int) -> tuple[int, int]:
        """Scales of keys and of values that calibration finds for a block.

        Args:
            heads: of keys and values.
            width: numbers of one.
        """
        per = dict(zip(STATIC, (1, heads, heads * width), strict=True))
        return per.get(str(self.keys.granularity), 0), per.get(str(self.values.granularity), 0)

    def misfit(self, width: int) -> str | None:
        """Why heads of that many numbers cannot be held; None if they can."""
        if self.hadamard and width % self.hadamard:
            return f"keys of {width} channels cannot be cut into runs of {self.hadamard}"
        grouped = (fmt for fmt in (self.keys, self.values) if fmt.granularity is None)
        reasons = ((fmt.label, fmt.misfit(width)) for fmt in grouped)
        return next((f"{label}: {why}".replace("rows of", "heads of") for label, why in reasons if why), None)


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
    if cache.hadamard is not None:
        return {"keys": keys, "values": values, "hadamard": cache.hadamard}
    return keys if keys == values else {"keys": keys, "values": values}
