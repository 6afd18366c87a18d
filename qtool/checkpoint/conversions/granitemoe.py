"""Granite 3, mixtures of experts: Granite's multipliers, and experts whose gate and up files keep in one matrix."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions.granite import Granite

EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}


class GraniteMoe(Granite):
    """`GraniteMoeForCausalLM`."""

    architecture = "GraniteMoeForCausalLM"
    gguf_arch = "granitemoe"
    numbers: ClassVar[dict[str, str]] = Granite.numbers | EXPERTS
    names: ClassVar[dict[str, str]] = {
        "block_sparse_moe.experts.": "mlp.experts.",
        "shared_mlp.gate_proj": "feed_forward.shared_expert.gate_proj",
        "shared_mlp.up_proj": "feed_forward.shared_expert.up_proj",
    }
    mixture = True
    apart = True
