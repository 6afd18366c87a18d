"""EXAONE 4: norms behind attention and MLP, and on heads of q and k; in the large one attention slides mostly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qtool.checkpoint.conversions._base import Conversion, check_layers
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import check_fixed, positive

PERIOD = ("sliding_attention",) * 3 + ("full_attention",)
LARGE = 64
"""Blocks of the one model whose attention slides in llama.cpp, and is rotated only there."""


class Exaone4(Conversion):
    """`Exaone4ForCausalLM`."""

    architecture = "Exaone4ForCausalLM"
    gguf_arch = "exaone4"

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        if int(config["num_hidden_layers"]) != LARGE:
            check_fixed(self.gguf_arch, {"window": config.get("sliding_window") or 0}, {"window": 0})
            check_layers(self.gguf_arch, config, ("full_attention",))
            return {}
        check_layers(self.gguf_arch, config, PERIOD)
        return {"attention.sliding_window": int(config["sliding_window"])}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        count = positive(metadata, "exaone4.block_count")
        window = metadata.get("exaone4.attention.sliding_window")
        types = [(PERIOD if window else PERIOD[3:])[i % (4 if window else 1)] for i in range(count)]
        return super().gguf_fields(metadata, tensors) | {"sliding_window": window, "layer_types": types}
