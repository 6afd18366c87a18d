"""Mistral 7B and its dense relatives: Llama with an optional sliding attention window.

Source: https://huggingface.co/docs/transformers/model_doc/mistral
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family, Value


class Mistral(Family):
    """`MistralForCausalLM`. Its GGUF files are Llama's; only a sliding window tells them apart."""

    architecture = "MistralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }
    gguf_arch = "llama"
    gguf_marker = "llama.attention.sliding_window"
    gguf_permute = frozenset({"q", "k"})
    rope_kinds = (*Family.rope_kinds, "llama3")

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        values = super().gguf_metadata(config)
        if config.get("sliding_window"):
            values["llama.attention.sliding_window"] = int(config["sliding_window"])
        return values

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        return {"sliding_window": metadata.get("llama.attention.sliding_window")}
