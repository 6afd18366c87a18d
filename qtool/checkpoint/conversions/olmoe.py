"""OLMoE: norms on all heads of q and k together, many small experts."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._base import GGUF_FIELDS


class Olmoe(Conversion):
    """`OlmoeForCausalLM`."""

    architecture = "OlmoeForCausalLM"
    gguf_arch = "olmoe"
    gguf_untied = True
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
    }
    fixed: ClassVar[dict[str, Any]] = {"norm_topk_prob": False, "clip_qkv": None}
    mixture = True
