"""Qwen 2 and 2.5, dense: biases on q, k and v.

Source: https://huggingface.co/docs/transformers/model_doc/qwen2
"""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family


class Qwen2(Family):
    """`Qwen2ForCausalLM`."""

    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
    }
    gguf_arch = "qwen2"

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """See `Family.has_bias`."""
        return role in ("q", "k", "v")
