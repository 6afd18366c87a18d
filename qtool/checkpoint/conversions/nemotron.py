"""Nemotron 3 and 4, Minitron: layer norms that multiply with 1 + weight, and squares of ReLU."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion


class Nemotron(Conversion):
    """`NemotronForCausalLM`."""

    architecture = "NemotronForCausalLM"
    gguf_arch = "nemotron"
    gguf_untied = True
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {"attention.layer_norm_epsilon": "norm_eps"}

    activation = ("hidden_act", "relu2")
    norm_offset = 1.0
    partial = 0.5
