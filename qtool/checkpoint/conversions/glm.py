"""GLM 4 9B as it was first published."""

from __future__ import annotations

from qtool.checkpoint.conversions._base import Conversion


class Glm(Conversion):
    """`GlmForCausalLM`."""

    architecture = "GlmForCausalLM"
    gguf_arch = "chatglm"
    partial = 0.5
