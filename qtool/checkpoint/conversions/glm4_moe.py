"""GLM 4.5 to 4.7: half of every head is rotated, blocks behind the first ones have experts."""

from __future__ import annotations

from qtool.checkpoint.conversions._experts import LateExperts


class Glm4Moe(LateExperts):
    """`Glm4MoeForCausalLM`."""

    architecture = "Glm4MoeForCausalLM"
    gguf_arch = "glm4moe"
    partial = 0.5
