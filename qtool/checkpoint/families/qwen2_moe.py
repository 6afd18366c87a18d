"""Qwen 1.5 and 2, mixtures of experts: small experts, and a large one that all tokens go through, behind a gate.

Source: https://huggingface.co/docs/transformers/model_doc/qwen2_moe
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._moe import MixtureOfExperts
from qtool.checkpoint.families._parts import Linear

SHARED = (
    Linear("mlp.shared_expert.gate_proj", "gate", "mlp_in", "mlp.shared_expert.gate_up"),
    Linear("mlp.shared_expert.up_proj", "up", "mlp_in", "mlp.shared_expert.gate_up"),
    Linear("mlp.shared_expert.down_proj", "down", "mlp.shared_expert.mid"),
    Linear("mlp.shared_expert_gate", "router", "mlp_in", kind="router"),
)
WIDE, GGUF_WIDE = "shared_expert_intermediate_size", "qwen2moe.expert_shared_feed_forward_length"


class Qwen2MoE(MixtureOfExperts):
    """`Qwen2MoeForCausalLM`."""

    architecture = "Qwen2MoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        WIDE: 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
    }
    counts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", WIDE, "decoder_sparse_step")
    gguf_arch = "qwen2moe"
    gguf_untied = True
    gguf_normed = False

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """See `Family.has_bias`."""
        return role in ("q", "k", "v") and bool(config["qkv_bias"])

    def shared(self, config: dict[str, Any]) -> tuple[Linear, ...]:
        """See `MixtureOfExperts.shared`."""
        return SHARED

    def linear_shape(self, config: dict[str, Any], linear: Linear) -> tuple[int, int]:
        """See `Family.linear_shape`."""
        if linear not in SHARED:
            return super().linear_shape(config, linear)
        hidden, wide = int(config["hidden_size"]), int(config[WIDE])
        if linear.role == "down":
            return hidden, wide
        return 1 if linear.role == "router" else wide, hidden

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        return super().gguf_metadata(config) | {GGUF_WIDE: int(config[WIDE])}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        own = {WIDE: metadata.get(GGUF_WIDE), "qkv_bias": "blk.0.attn_q.bias" in tensors, "norm_topk_prob": False}
        return super().gguf_fields(metadata, tensors) | own
