"""Granite 3, mixtures of experts with one that all tokens go through."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions.granitemoe import GraniteMoe


class GraniteMoeShared(GraniteMoe):
    """`GraniteMoeSharedForCausalLM`."""

    architecture = "GraniteMoeSharedForCausalLM"
    numbers: ClassVar[dict[str, str]] = GraniteMoe.numbers | {
        "expert_shared_feed_forward_length": "shared_intermediate_size"
    }
    gguf_marker = "granitemoe.expert_shared_feed_forward_length"
