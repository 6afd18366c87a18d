"""Hunyuan A13B: norms on heads of q and k behind the rotary embedding, experts and one for all tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._base import GGUF_FIELDS, Value


class HunyuanV1Moe(Conversion):
    """`HunYuanMoEV1ForCausalLM`."""

    architecture = "HunYuanMoEV1ForCausalLM"
    gguf_arch = "hunyuan-moe"
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "expert_count": "num_experts",
        "expert_used_count": "moe_topk",
    }
    mixture = True

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`: all experts are as wide as the one for all tokens."""
        wide = int(config["intermediate_size"])
        values: dict[str, Value] = {"expert_shared_count": 1, "expert_feed_forward_length": wide}
        return values | {"expert_shared_feed_forward_length": wide}
