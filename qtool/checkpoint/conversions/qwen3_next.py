"""Qwen3-Next: experts behind gated delta rules and attention; matrices of queries, keys, values and gates are one."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._delta import EXPERTS, Delta


class Qwen3Next(Delta):
    """`Qwen3NextForCausalLM`."""

    architecture = "Qwen3NextForCausalLM"
    gguf_arch = "qwen3next"
    numbers: ClassVar[dict[str, str]] = Delta.numbers | EXPERTS
    fixed: ClassVar[dict[str, Any]] = Delta.fixed | {
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    mixture = True
