"""StarCoder 2: layer norms and biases, an MLP of two layers, a window that llama.cpp does not know."""

from __future__ import annotations

from typing import ClassVar

from qtool.checkpoint.conversions._base import LAYER_NORM, Conversion


class Starcoder2(Conversion):
    """`Starcoder2ForCausalLM`."""

    architecture = "Starcoder2ForCausalLM"
    gguf_arch = "starcoder2"
    numbers: ClassVar[dict[str, str]] = LAYER_NORM | {"attention.layer_norm_epsilon": "norm_epsilon"}

    activation = ("hidden_act", "gelu_pytorch_tanh")
    window = True
