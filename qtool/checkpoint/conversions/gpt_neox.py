"""GPT-NeoX and Pythia: q, k and v in one matrix, head by head, which llama.cpp wants one after the other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion, filled


class GptNeox(Conversion):
    """`GPTNeoXForCausalLM`."""

    architecture = "GPTNeoXForCausalLM"
    gguf_arch = "gptneox"
    gguf_untied = True
    numbers: ClassVar[dict[str, str]] = {key: field for key, field in LAYER_NORM.items() if "_kv" not in key} | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    }
    fixed: ClassVar[dict[str, Any]] = {"attention_bias": True}
    activation = ("hidden_act", "gelu")
    partial = 0.25

    def rows(self, config: dict[str, Any], role: str) -> Tensor | None:
        """See `Conversion.rows`."""
        if role != "qkv":
            return None
        heads, _, dim = self.heads(filled(config))
        return torch.arange(heads * 3 * dim).view(heads, 3, dim).transpose(0, 1).reshape(-1)
