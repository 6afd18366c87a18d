"""Qwen3.5 with experts, the language model."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions._delta import EXPERTS
from qtool.checkpoint.conversions.qwen3_5_text import Qwen35Text


class Qwen35MoeText(Qwen35Text):
    """`Qwen3_5MoeForCausalLM`."""

    architecture = "Qwen3_5MoeForCausalLM"
    gguf_arch = "qwen35moe"
    numbers: ClassVar[dict[str, str]] = {
        key: field for key, field in (Qwen35Text.numbers | EXPERTS).items() if key != "feed_forward_length"
    }
    mixture = True
