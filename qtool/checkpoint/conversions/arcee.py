"""AFM: Llama with an MLP of two layers and squares of ReLU."""

from __future__ import annotations

from qtool.checkpoint.conversions._base import Conversion


class Arcee(Conversion):
    """`ArceeForCausalLM`."""

    architecture = "ArceeForCausalLM"
    gguf_arch = "arcee"
    activation = ("hidden_act", "relu2")
    gguf_permute = frozenset({"q", "k"})
    rope_kinds = (*Conversion.rope_kinds, "llama3")
