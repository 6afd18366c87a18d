"""Qwen3.5, dense, the language model: gated delta rules, and attention in every fourth block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.conversions._delta import Delta
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import check_fixed

SECTIONS = ("mrope_section", "mrope_interleaved")
"""What says how positions of pictures are rotated; those of text are the same in all sections."""
USUAL = [11, 11, 10]


class Qwen35Text(Delta):
    """`Qwen3_5ForCausalLM`.

    Where there are more heads of values than of keys, llama.cpp wants values in another order, and so the columns of
    the matrix behind them, which codes in blocks of columns cannot follow.
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
        heads = {"linear_num_value_heads": config["linear_num_key_heads"]}
        check_fixed(self.gguf_arch, config, heads)
        sections = super().rope(config)["rope_parameters"].get("mrope_section") or USUAL
        return super().more(config) | {"rope.dimension_sections": [*(int(x) for x in sections), 0]}
