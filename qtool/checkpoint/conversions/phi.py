"""Phi 1 to 2: attention and MLP read the same norm, and a part of every head is rotated."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion


class Phi(Conversion):
    """`PhiForCausalLM`."""

    architecture = "PhiForCausalLM"
    gguf_arch = "phi2"
    gguf_untied = True
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {"attention.layer_norm_epsilon": "layer_norm_eps"}

    fixed: ClassVar[dict[str, Any]] = {"qk_layernorm": False}
    activation = ("hidden_act", "gelu_new")
    partial = 0.5
