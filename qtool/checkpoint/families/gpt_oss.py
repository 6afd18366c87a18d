"""gpt-oss: experts with biases and a clamped activation, attention with sinks, every second block's attention slides.

Checkpoints are read in bfloat16, and with experts in MXFP4, as OpenAI published them.
Source: https://huggingface.co/docs/transformers/model_doc/gpt_oss
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import check_fixed
from qtool.checkpoint.families._moe import MixtureOfExperts
from qtool.errors import CheckpointError

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
"""What transformers assumes where config.json says nothing about the rotary embedding."""
ACTIVATION = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
"""What llama.cpp takes for granted of the experts' activation."""


class GPTOSS(MixtureOfExperts):
    """`GptOssForCausalLM`."""

    architecture = "GptOssForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
    }
    counts = ("num_local_experts", "num_experts_per_tok", "sliding_window")
    router = "router"
    experts_field = "num_local_experts"
    wide_field = "intermediate_size"
    interleaved = True
    gated_product = False  # up is clamped, and one is added to it
    sinks = True
    separate_experts = False
    gguf_arch = "gpt-oss"
    gguf_untied = True

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """See `Family.has_bias`."""
        return role not in ("q", "k", "v", "o") or bool(config["attention_bias"])

    def block_shapes(self, config: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
        """See `Family.block_shapes`."""
        return super().block_shapes(config, i) | {"self_attn.sinks": (self.heads(config)[0],)}

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`. llama.cpp rounds YaRN's ranges to whole dimensions, whatever `truncate` says."""
        turns = [("sliding_attention", "full_attention")[i % 2] for i in range(self.blocks(config))]
        if (found := config.get("layer_types") or turns) != turns:
            wanted = "sliding and full attention in turns"
            raise CheckpointError("GGUF cannot hold these layer_types", wanted=wanted, found=f"{found!r:.60}")
        check_fixed(self.gguf_arch, config, ACTIVATION)
        window = {"gpt-oss.attention.sliding_window": int(config["sliding_window"])}
        wide = {"gpt-oss.expert_feed_forward_length": int(config["intermediate_size"])}
        return super().gguf_metadata(config) | window | wide

    def rope(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.rope`."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or YARN
        parameters = {field: value for field, value in rope.items() if field != "truncate"}
        theta = config.get("rope_theta") or 150000.0
        return config | {"rope_scaling": None, "rope_theta": theta, "rope_parameters": parameters}

    def gguf_window(self, config: dict[str, Any]) -> int | None:
        """See `Family.gguf_window`: llama.cpp applies it."""
        return None

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        fields = super().gguf_fields(metadata, tensors) | {
            "sliding_window": metadata.get("gpt-oss.attention.sliding_window"),
            "attention_bias": "blk.0.attn_q.bias" in tensors,
        }
        if metadata.get("gpt-oss.rope.scaling.type", "none") == "none":
            fields["rope_parameters"] = {"rope_type": "default", "rope_theta": metadata.get("gpt-oss.rope.freq_base")}
        return fields

    def gguf_names(self, config: dict[str, Any]) -> dict[str, str]:
        """See `Family.gguf_names`. Sinks are called weights there."""
        names = super().gguf_names(config)
        return {here: f"{there}.weight" if here.endswith(".sinks") else there for here, there in names.items()}
