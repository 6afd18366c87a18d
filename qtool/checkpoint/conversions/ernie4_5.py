"""ERNIE 4.5, dense: rotates neighbours."""

from __future__ import annotations

from qtool.checkpoint.conversions._base import Conversion


class Ernie45(Conversion):
    """`Ernie4_5ForCausalLM`."""

    architecture = "Ernie4_5ForCausalLM"
    gguf_arch = "ernie4_5"
