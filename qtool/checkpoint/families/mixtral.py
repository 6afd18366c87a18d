"""Mixtral: Mistral with eight experts in each block, of which a token visits two.

Source: https://huggingface.co/docs/transformers/model_doc/mixtral
"""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.families._moe import MixtureOfExperts
from qtool.checkpoint.families._window import OptionalWindow


class Mixtral(OptionalWindow, MixtureOfExperts):
    """`MixtralForCausalLM`. Its GGUF files are Llama's, with experts."""

    architecture = "MixtralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    counts = ("num_local_experts", "num_experts_per_tok")
    part = ("block_sparse_moe", "mlp")
    projections: ClassVar[dict[str, str]] = {"gate": "w1", "up": "w3", "down": "w2"}
    experts_field = "num_local_experts"
    wide_field = "intermediate_size"
    gguf_arch = "llama"
    gguf_permute = frozenset({"q", "k"})
    rope_kinds = (*MixtureOfExperts.rope_kinds, "llama3")
