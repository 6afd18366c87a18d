"""Command R: attention and MLP read the same norm, which has no bias, and logits are scaled."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import check_fixed

PLUS = 64
"""Blocks from which on llama.cpp wants norms of queries and keys, which it knows of no shorter model."""


class Cohere(Conversion):
    """`CohereForCausalLM`."""

    architecture = "CohereForCausalLM"
    gguf_arch = "command-r"
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "logit_scale": "logit_scale",
    }

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        check_fixed(self.gguf_arch, config, {"use_qk_norm": int(config["num_hidden_layers"]) >= PLUS})
        return super().more(config)
