"""Gemma 3, text only: attention slides in five of six blocks, with a rotary embedding of its own.

Source: https://huggingface.co/docs/transformers/model_doc/gemma3
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gemma import SlidingGemma
from qtool.checkpoint.families._rope import rope_parameters
from qtool.errors import CheckpointError


class Gemma3Text(SlidingGemma):
    """`Gemma3ForCausalLM`."""

    architecture = "Gemma3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
    }
    norms: ClassVar[dict[str, str]] = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"} | SlidingGemma.norms
    rope_kinds = ("default", "linear")
    gguf_arch = "gemma3"
    period = 6
    largest = 62

    def rope(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.rope`."""
        nested = config.get("rope_parameters") or {}
        return config | {
            "rope_theta": config.get("rope_theta") or 1e6,
            "rope_parameters": nested.get("full_attention", {} if "sliding_attention" in nested else nested),
        }

    def sliding_theta(self, config: dict[str, Any]) -> float:
        """Base of the rotary embedding where attention slides.

        Raises:
            CheckpointError: it is scaled as well.
        """
        nested = config.get("rope_parameters") or {}
        theta = {"rope_theta": config.get("rope_local_base_freq") or 10000.0}
        rope = rope_parameters({"rope_parameters": theta | (nested.get("sliding_attention") or {})})
        if rope["rope_type"] != "default":
            what = "GGUF cannot hold a rotary scaling of sliding attention"
            raise CheckpointError(what, wanted="default", found=f"{rope['rope_type']!r:.40}")
        return float(rope["rope_theta"])

    def fixed(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `SlidingGemma.fixed`."""
        return super().fixed(config) | {"final_logit_softcapping": None}

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        return super().gguf_metadata(config) | {"gemma3.rope.freq_base_swa": self.sliding_theta(config)}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        theta = metadata.get("gemma3.rope.freq_base_swa", 10000.0)
        return super().gguf_fields(metadata, tensors) | {"rope_local_base_freq": theta}
