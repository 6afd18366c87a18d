"""OLMo 3: OLMo 2 with attention that slides in three of four blocks, and no scaling of its rotary embedding there."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion, check_layers
from qtool.checkpoint.families._base import GGUF_FIELDS, Value


class Olmo3(Conversion):
    """`Olmo3ForCausalLM`."""

    architecture = "Olmo3ForCausalLM"
    gguf_arch = "olmo2"
    gguf_untied = True
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {"attention.sliding_window": "sliding_window"}
    gguf_marker = "olmo2.attention.sliding_window"

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        check_layers(self.gguf_arch, config, ("sliding_attention",) * 3 + ("full_attention",))
        return {}
