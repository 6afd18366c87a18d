"""Llama 1 to 3.3, and what uses its architecture: SmolLM2, TinyLlama, Yi, ...

Source: https://huggingface.co/docs/transformers/model_doc/llama
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family


class Llama(Family):
    """`LlamaForCausalLM`."""

    architecture = "LlamaForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    gguf_arch = "llama"
    gguf_permute = frozenset({"q", "k"})
    rope_kinds = (*Family.rope_kinds, "llama3")

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """See `Family.has_bias`."""
        return bool(config.get("attention_bias" if role in ("q", "k", "v", "o") else "mlp_bias", False))

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
