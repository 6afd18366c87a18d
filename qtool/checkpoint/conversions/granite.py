"""Granite 3 and 4, dense: Llama with multipliers on embeddings, scores, what blocks add, and logits."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._base import GGUF_FIELDS


class Granite(Conversion):
    """`GraniteForCausalLM`."""

    architecture = "GraniteForCausalLM"
    gguf_arch = "granite"
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    gguf_permute = frozenset({"q", "k"})
