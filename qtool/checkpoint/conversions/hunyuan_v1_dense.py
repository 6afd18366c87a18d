"""Hunyuan 1, dense: norms on heads of q and k behind the rotary embedding."""

from __future__ import annotations

from qtool.checkpoint.conversions._base import Conversion


class HunyuanV1Dense(Conversion):
    """`HunYuanDenseV1ForCausalLM`."""

    architecture = "HunYuanDenseV1ForCausalLM"
    gguf_arch = "hunyuan-dense"
