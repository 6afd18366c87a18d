"""Gemma 2: attention slides in every other block, scores and logits are softly capped.

Source: https://huggingface.co/docs/transformers/model_doc/gemma2
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gemma import SlidingGemma
from qtool.errors import CheckpointError

SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


class Gemma2(SlidingGemma):
    """`Gemma2ForCausalLM`."""

    architecture = "Gemma2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    attention = "eager"  # the only implementation that caps scores
    gguf_arch = "gemma2"
    period = 2
    largest = 46

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        if missing := [field for field in SOFTCAPS if not config[field]]:
            raise CheckpointError(f"llama.cpp caps all gemma2 models: config.json sets no {missing[0]}")
        return super().gguf_metadata(config) | {f"gemma2.{field}": float(config[field]) for field in SOFTCAPS}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        caps = {field: metadata.get(f"gemma2.{field}", self.defaults[field]) for field in SOFTCAPS}
        return super().gguf_fields(metadata, tensors) | caps
