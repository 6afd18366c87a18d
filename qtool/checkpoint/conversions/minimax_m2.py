"""MiniMax M2: norms on all heads of q and k together, half of each is rotated, experts chosen by sigmoid and a bias."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions._experts import BiasedExperts
from qtool.checkpoint.families._base import GGUF_FIELDS


class MinimaxM2(BiasedExperts):
    """`MiniMaxM2ForCausalLM`."""

    architecture = "MiniMaxM2ForCausalLM"
    gguf_arch = "minimax-m2"
    gguf_untied = True
    partial = 1.0
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    }
