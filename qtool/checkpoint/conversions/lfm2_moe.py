"""LFM2 with experts behind the first blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.conversions._experts import SIGMOID
from qtool.checkpoint.conversions._states import Recurrent
from qtool.checkpoint.conversions.lfm2 import kinds_of
from qtool.checkpoint.families._base import GGUF_FIELDS, Value


class Lfm2Moe(Recurrent):
    """`Lfm2MoeForCausalLM`."""

    architecture = "Lfm2MoeForCausalLM"
    gguf_arch = "lfm2moe"
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "shortconv.l_cache": "conv_L_cache",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "leading_dense_block_count": "num_dense_layers",
    }
    fixed: ClassVar[dict[str, Any]] = {
        "conv_bias": False,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
    }
    activation = ("", "")
    names: ClassVar[dict[str, str]] = {
        "expert_bias": "expert_bias.bias",
        "feed_forward.experts.w1": "mlp.experts.gate_proj",
        "feed_forward.experts.w2": "mlp.experts.down_proj",
        "feed_forward.experts.w3": "mlp.experts.up_proj",
    }
    mixture = True

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        heads = int(config["num_key_value_heads"])
        counts = [heads if kind == "full_attention" else 0 for kind in config["layer_types"]]
        return {"attention.head_count_kv": counts, "expert_gating_func": SIGMOID}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        return super().gguf_fields(metadata, tensors) | {"layer_types": kinds_of(metadata, self.gguf_arch)}
