"""OLMo 2: norms behind attention and MLP, and on all heads of q and k together."""

from __future__ import annotations

from qtool.checkpoint.conversions._base import Conversion


class Olmo2(Conversion):
    """`Olmo2ForCausalLM`."""

    architecture = "Olmo2ForCausalLM"
    gguf_arch = "olmo2"
    gguf_untied = True
