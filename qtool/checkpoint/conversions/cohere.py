"""Command R: attention and MLP read the same norm, which has no bias, and logits are scaled."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion


class Cohere(Conversion):
    """`CohereForCausalLM`."""

    architecture = "CohereForCausalLM"
    gguf_arch = "command-r"
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "logit_scale": "logit_scale",
    }
