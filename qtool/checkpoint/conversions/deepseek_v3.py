"""DeepSeek V3 and R1: latent attention; experts in groups, chosen by sigmoid."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._latent import Latent


class DeepseekV3(Latent):
    """`DeepseekV3ForCausalLM`."""

    architecture = "DeepseekV3ForCausalLM"
    fixed: ClassVar[dict[str, Any]] = {"rope_interleave": True}
