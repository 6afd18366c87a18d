"""Qwen 3, mixtures of experts: many small experts, norms on the heads of q and k.

Source: https://huggingface.co/docs/transformers/model_doc/qwen3_moe
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._moe import MixtureOfExperts
from qtool.checkpoint.families.qwen3 import Qwen3


class Qwen3MoE(MixtureOfExperts):
    """`Qwen3MoeForCausalLM`."""

    architecture = "Qwen3MoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    }
    spellings: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    counts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
    norms: ClassVar[dict[str, str]] = Qwen3.norms
    gguf_arch = "qwen3moe"

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """See `Family.has_bias`."""
        return role in ("q", "k", "v", "o") and bool(config.get("attention_bias", False))

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        own = {"attention_bias": "blk.0.attn_q.bias" in tensors, "norm_topk_prob": True}
        return super().gguf_fields(metadata, tensors) | own
