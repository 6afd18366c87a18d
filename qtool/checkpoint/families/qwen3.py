"""Qwen 3, dense: norms on the heads of q and k, a head dimension of its own.

Source: https://huggingface.co/docs/transformers/model_doc/qwen3
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family


class Qwen3(Family):
    """`Qwen3ForCausalLM`."""

    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
    }
    norms: ClassVar[dict[str, str]] = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"} | Family.norms
    gguf_arch = "qwen3"

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """See `Family.has_bias`."""
        return role in ("q", "k", "v", "o") and bool(config.get("attention_bias", False))

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        return {"attention_bias": "blk.0.attn_q.bias" in tensors}
