"""ERNIE 4.5, mixtures of experts: rotates neighbours, experts chosen by softmax and a bias."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed


class Ernie45Moe(Conversion):
    """`Ernie4_5_MoeForCausalLM`."""

    architecture = "Ernie4_5_MoeForCausalLM"
    gguf_arch = "ernie4_5-moe"
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "expert_feed_forward_length": "moe_intermediate_size",
        "leading_dense_block_count": "moe_layer_start_index",
        "interleave_moe_layer_step": "moe_layer_interval",
        "expert_shared_count": "moe_num_shared_experts",
    }
    names: ClassVar[dict[str, str]] = {"moe_statics.e_score_correction_bias": "moe_statics.e_score_correction.bias"}
    mixture = True

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        last = int(config["moe_layer_end_index"]) % int(config["num_hidden_layers"])
        check_fixed(self.gguf_arch, {"last": last}, {"last": int(config["num_hidden_layers"]) - 1})
        wide = int(config["moe_intermediate_size"]) * int(config["moe_num_shared_experts"])
        return {"expert_shared_feed_forward_length": wide}
