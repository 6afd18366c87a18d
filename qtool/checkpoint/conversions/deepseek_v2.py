"""DeepSeek V2: latent attention; experts chosen by softmax, all of them at once."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._experts import SOFTMAX
from qtool.checkpoint.conversions._latent import Latent


class DeepseekV2(Latent):
    """`DeepseekV2ForCausalLM`."""

    architecture = "DeepseekV2ForCausalLM"
    optional: ClassVar[dict[str, str]] = {
        key: field for key, field in Latent.optional.items() if "group" not in key and "norm" not in key
    }
    fixed: ClassVar[dict[str, Any]] = {"topk_method": "greedy", "norm_topk_prob": False}
    gguf_marker = "deepseek2.expert_gating_func", SOFTMAX
    gating = SOFTMAX
