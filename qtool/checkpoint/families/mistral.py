"""Mistral 7B and its dense relatives: Llama with an optional sliding attention window.

Source: https://huggingface.co/docs/transformers/model_doc/mistral
"""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.families._window import OptionalWindow


class Mistral(OptionalWindow):
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
    rope_kinds = (*OptionalWindow.rope_kinds, "llama3")
