"""Mixtures of experts: what their conversions have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._base import GGUF_FIELDS, Value

SOFTMAX, SIGMOID = 1, 2
"""`llama_expert_gating_func_type` of llama.cpp."""
EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "leading_dense_block_count": "first_k_dense_replace",
}


class BiasedExperts(Conversion):
    """Experts whose scores are made by sigmoid, with a bias that only chooses.

    Attributes:
        gating: how scores are made, as llama.cpp counts that.
    """

    names: ClassVar[dict[str, str]] = {"e_score_correction_bias": "e_score_correction.bias"}
    mixture = True
    gating: ClassVar[int] = SIGMOID

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        return {"expert_gating_func": self.gating}


class LateExperts(BiasedExperts):
    """Experts as DeepSeek V3 has them: in groups, and experts for all tokens."""

    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | EXPERTS
    optional: ClassVar[dict[str, str]] = {
        "expert_shared_count": "n_shared_experts",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
    }
