"""Llama 4, the language model: attention in chunks but for every fourth block, and experts that read scaled inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed, positive

PERIOD = 4
UNNORMED = 128
"""Experts of the model whose queries and keys have no norm; llama.cpp tells it by their number."""


class Llama4Text(Conversion):
    """`Llama4ForCausalLM`."""

    architecture = "Llama4ForCausalLM"
    gguf_arch = "llama4"
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    }
    fixed: ClassVar[dict[str, Any]] = {
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attention_bias": False,
    }
    mixture = True

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        count, step = int(config["num_hidden_layers"]), int(config["interleave_moe_layer_step"])
        turns = [int((i + 1) % PERIOD != 0) for i in range(count)]
        wanted = {
            "no_rope_layers": turns,
            "layer_types": ["chunked_attention" if turn else "full_attention" for turn in turns],
            "moe_layers": [*range(step - 1, count, step)],
            "use_qk_norm": config["num_local_experts"] != UNNORMED,
        }
        check_fixed(self.gguf_arch, config, wanted)
        return {}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        normed = positive(metadata, "llama4.expert_count") != UNNORMED
        return super().gguf_fields(metadata, tensors) | {"use_qk_norm": normed}
