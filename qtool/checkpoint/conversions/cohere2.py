"""Command R7B and A: of four blocks' attention three slide over a window; the fourth has no rotary embedding."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion, check_layers
from qtool.checkpoint.families._base import Value


class Cohere2(Conversion):
    """`Cohere2ForCausalLM`."""

    architecture = "Cohere2ForCausalLM"
    gguf_arch = "cohere2"
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "logit_scale": "logit_scale",
        "attention.sliding_window": "sliding_window",
    }

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`: llama.cpp knows by heart which blocks slide."""
        check_layers(self.gguf_arch, config, ("sliding_attention",) * 3 + ("full_attention",))
        return {}
