"""Gated delta rule with attention in every fourth block, as Qwen3-Next and Qwen3.5 have it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import check_layers
from qtool.checkpoint.conversions._states import Recurrent
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed, positive

PERIOD = ("linear_attention",) * 3 + ("full_attention",)

EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


class Delta(Recurrent):
    """A quarter of every head of attention is rotated, and its output is gated."""

    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
    }
    fixed: ClassVar[dict[str, Any]] = {"attention_bias": False}
    norm_offset = 1.0
    partial = 0.25

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        check_layers(self.gguf_arch, config, PERIOD)
        dim = int(config["linear_value_head_dim"])
        check_fixed(self.gguf_arch, config, {"linear_value_head_dim": config["linear_key_head_dim"]})
        return {"ssm.inner_size": dim * int(config["linear_num_value_heads"]), "full_attention_interval": len(PERIOD)}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        count = positive(metadata, f"{self.gguf_arch}.block_count")
        types = [PERIOD[i % len(PERIOD)] for i in range(count)]
        dim = positive(metadata, f"{self.gguf_arch}.ssm.state_size")
        return super().gguf_fields(metadata, tensors) | {"layer_types": types, "linear_value_head_dim": dim}

    def offset(self, name: str) -> float:
        """See `Conversion.offset`: the norm behind a state has none."""
        return 0.0 if name.endswith("linear_attn.norm.weight") else super().offset(name)
