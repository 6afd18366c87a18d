"""Qwen3.5, dense, the language model: gated delta rules, and attention in every fourth block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.conversions._base import filled
from qtool.checkpoint.conversions._delta import Delta
from qtool.checkpoint.conversions._equal import Change, Equal
from qtool.checkpoint.conversions._states import CONVOLUTIONS
from qtool.checkpoint.derived.skeleton import IN_TURN, value_order
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import Form, positive

SECTIONS = ("mrope_section", "mrope_interleaved")
"""What says how positions of pictures are rotated; those of text are the same in all sections."""
USUAL = [11, 11, 10]
OUT = "linear_attn.out_proj.weight"
VALUES: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "in_proj_z": lambda config: int(config["linear_value_head_dim"]),
    "in_proj_b": lambda config: 1,
    "in_proj_a": lambda config: 1,
}
"""Roles of layers that write something for each head of values, and how many numbers."""


class Qwen35Text(Delta):
    """`Qwen3_5ForCausalLM`.

    Where there are more heads of values than of keys, llama.cpp repeats all heads of keys in turn, and so wants values,
    and the columns of the matrix behind them, in another order.
    """

    architecture = "Qwen3_5ForCausalLM"
    gguf_arch = "qwen35"

    def rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Conversion.rope`."""
        found = super().rope(config)
        rope = {field: value for field, value in found["rope_parameters"].items() if field not in SECTIONS}
        return found | {"rope_parameters": rope}

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        sections = super().rope(config)["rope_parameters"].get("mrope_section") or USUAL
        return super().more(config) | {"rope.dimension_sections": [*(int(x) for x in sections), 0]}

    def equal(self, config: Mapping[str, Any], tied: bool) -> Equal | None:
        """See `Conversion.equal`."""
        order = None if config.get(IN_TURN) else value_order(config)
        return None if order is None else turned(config, order, True)

    def straight(self, config: Mapping[str, Any]) -> Equal | None:
        """See `Conversion.straight`."""
        order = value_order(config) if config.get(IN_TURN) else None
        return None if order is None else turned(config, order.argsort(), False)

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        fields = super().gguf_fields(metadata, tensors)
        keys, values = (positive(metadata, f"{self.gguf_arch}.ssm.{key}") for key in ("group_count", "time_step_rank"))
        return fields | ({IN_TURN: True} if values != keys else {})

    def rows(self, config: dict[str, Any], role: str) -> Tensor | None:
        """See `Conversion.rows`: those of values, of what gates them, and of how fast they are forgotten."""
        full = filled(config)
        if (order := value_order(full)) is None or role not in ("qkv", *VALUES):
            return super().rows(config, role)
        return self.channels(full) if role == "qkv" else spread_heads(order, VALUES[role](full))

    def channels(self, config: Mapping[str, Any]) -> Tensor:
        """Order of queries, keys and values, int64 [C]; only that of values changes."""
        order, keys = value_order(config), int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
        assert order is not None
        return torch.cat([torch.arange(2 * keys), 2 * keys + spread_heads(order, int(config["linear_value_head_dim"]))])

    def form(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Form | None:
        """See `Conversion.form`."""
        found, order = super().form(config, name, shape), value_order(config)
        if order is None or not name.endswith((".A_log", ".dt_bias", *CONVOLUTIONS)):
            return found
        order = self.channels(config) if name.endswith(CONVOLUTIONS) else order
        own = found or Form(shape)
        return Form(own.shape, lambda x: own.write(x[order]), lambda x: own.read(x)[order.argsort()])


def spread_heads(order: Tensor, dim: int) -> Tensor:
    """Order of rows of heads that have `dim` each."""
    return (order[:, None] * dim + torch.arange(dim)).reshape(-1)


def turned(config: Mapping[str, Any], order: Tensor, by_turns: bool) -> Equal:
    """Heads of values in another order where they are read."""
    columns = spread_heads(order, int(config["linear_value_head_dim"]))
    return Equal({IN_TURN: by_turns}, {OUT: Change(columns=columns)}, "heads of values by turns")
