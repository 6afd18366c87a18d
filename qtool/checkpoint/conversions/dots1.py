"""dots.llm1: norms on heads of q and k, blocks behind the first ones have experts."""

from __future__ import annotations

from typing import Any

from qtool.checkpoint.conversions._experts import LateExperts
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import check_fixed


class Dots1(LateExperts):
    """`Dots1ForCausalLM`."""

    architecture = "Dots1ForCausalLM"
    gguf_arch = "dots1"
    gguf_untied = True
    window = True

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`: every head has its own keys and values."""
        check_fixed(self.gguf_arch, config, {"num_key_value_heads": config["num_attention_heads"]})
        return super().more(config)
