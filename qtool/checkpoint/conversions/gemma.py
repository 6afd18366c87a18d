"""Gemma 1: norms multiply with 1 + weight, embeddings are scaled by the square root of their length."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion


class Gemma(Conversion):
    """`GemmaForCausalLM`."""

    architecture = "GemmaForCausalLM"
    gguf_arch = "gemma"
    fixed: ClassVar[dict[str, Any]] = {"tie_word_embeddings": True, "attention_bias": False}
    activation = ("hidden_act", "gelu_pytorch_tanh")
    norm_offset = 1.0
