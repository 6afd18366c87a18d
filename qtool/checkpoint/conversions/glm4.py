"""GLM 4: norms before and behind attention and MLP, half of every head is rotated, neighbour by neighbour."""

from __future__ import annotations

from qtool.checkpoint.conversions._base import Conversion


class Glm4(Conversion):
    """`Glm4ForCausalLM`."""

    architecture = "Glm4ForCausalLM"
    gguf_arch = "glm4"
    partial = 0.5
