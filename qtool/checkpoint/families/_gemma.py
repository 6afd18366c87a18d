"""Gemma: what its dense text models have in common.

Norms multiply with 1 + weight, and there is one before and one behind each half of a block. Embeddings are scaled by
the square root of the hidden size, and attention slides in most blocks.
Source: https://huggingface.co/docs/transformers/model_doc/gemma2, and the models of the name in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family, Value
from qtool.checkpoint.families._gguf import check_fixed, positive


class SlidingGemma(Family):
    """A family of Gemma's.

    Attributes:
        period: every so many blocks attention does not slide; llama.cpp knows it by heart.
        largest: number of blocks of the model whose scores are divided by sqrt(E / H) instead of sqrt(D), likewise.
    """

    norms: ClassVar[dict[str, str]] = {
        "input_layernorm": "attn_in",
        "post_attention_layernorm": "stream",
        "pre_feedforward_layernorm": "mlp_in",
        "post_feedforward_layernorm": "stream",
    }
    norm_offset = 1.0
    counts = ("sliding_window",)
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    period: ClassVar[int]
    largest: ClassVar[int]

    def embedding_scale(self, config: dict[str, Any]) -> float:
        """See `Family.embedding_scale`."""
        return math.sqrt(config["hidden_size"])

    def logit_softcap(self, config: dict[str, Any]) -> float | None:
        """See `Family.logit_softcap`."""
        return config["final_logit_softcapping"] or None

    def scores_scale(self, config: dict[str, Any]) -> int:
        """The number whose square root llama.cpp divides attention scores by."""
        heads, _, dim = self.heads(config)
        return int(config["hidden_size"]) // heads if self.blocks(config) == self.largest else dim

    def fixed(self, config: dict[str, Any]) -> dict[str, Any]:
        """Fields of config.json that are not stored in GGUF, because llama.cpp knows their values."""
        slides = [(i + 1) % self.period != 0 for i in range(self.blocks(config))]
        return {
            "query_pre_attn_scalar": self.scores_scale(config),
            "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
            "tie_word_embeddings": True,
            "use_bidirectional_attention": False,
        }

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        check_fixed(self.gguf_arch, config, self.fixed(config))
        window = int(config["sliding_window"])
        return super().gguf_metadata(config) | {f"{self.gguf_arch}.attention.sliding_window": window}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        arch = self.gguf_arch
        scale = positive(metadata, f"{arch}.embedding_length") // positive(metadata, f"{arch}.attention.head_count")
        if positive(metadata, f"{arch}.block_count") != self.largest:
            scale = metadata.get(f"{arch}.attention.key_length", scale)
        window = metadata.get(f"{arch}.attention.sliding_window", self.defaults["sliding_window"])
        return {"query_pre_attn_scalar": scale, "sliding_window": window}
