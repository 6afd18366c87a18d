"""OLMo 1: norms without weights."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion
from qtool.checkpoint.families._base import Value


class Olmo(Conversion):
    """`OlmoForCausalLM`."""

    architecture = "OlmoForCausalLM"
    gguf_arch = "olmo"
    numbers: ClassVar[dict[str, str]] = LAYER_NORM
    optional: ClassVar[dict[str, str]] = {"attention.clamp_kqv": "clip_qkv"}
    gguf_permute = frozenset({"q", "k"})

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`: the class has this number in its code."""
        return {"attention.layer_norm_epsilon": 1e-5}
