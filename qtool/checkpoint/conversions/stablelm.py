"""StableLM: layer norms, of heads a quarter is rotated, attention and MLP may read the same norm."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion


class StableLm(Conversion):
    """`StableLmForCausalLM`."""

    architecture = "StableLmForCausalLM"
    gguf_arch = "stablelm"
    gguf_untied = True
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    }
    fixed: ClassVar[dict[str, Any]] = {"qk_layernorm": False}
    partial = 0.25
