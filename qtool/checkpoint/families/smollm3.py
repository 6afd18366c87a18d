"""SmolLM 3: Llama whose every fourth block has no rotary embedding.

Source: https://huggingface.co/docs/transformers/model_doc/smollm3
"""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family, Value
from qtool.checkpoint.families._gguf import check_fixed
from qtool.checkpoint.families.llama import Llama

PERIOD = 4
"""llama.cpp knows by heart which blocks have none."""


class Smollm3(Llama):
    """`SmolLM3ForCausalLM`."""

    architecture = "SmolLM3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    rope_kinds = Family.rope_kinds
    gguf_arch = "smollm3"

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        rotated = [int((i + 1) % PERIOD != 0) for i in range(self.blocks(config))]
        fixed: dict[str, Any] = {"no_rope_layers": rotated, "use_sliding_window": False}
        if config.get("no_rope_layers") is None:
            fixed["no_rope_layer_interval"] = PERIOD
        check_fixed("smollm3", config, fixed)
        return super().gguf_metadata(config)
