"""Granite 4: blocks with a state or with attention, an MLP for all tokens, and maybe experts beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from qtool.checkpoint.conversions._states import Mamba, check_steps
from qtool.checkpoint.conversions.granite import Granite
from qtool.checkpoint.conversions.granitemoe import EXPERTS, GraniteMoe
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import positive

STATE, ATTENTION = "linear_attention", "full_attention"
WIDTH, SHARED = "feed_forward_length", "expert_shared_feed_forward_length"


class GraniteMoeHybrid(Mamba):
    """`GraniteMoeHybridForCausalLM`. Where there are no experts, the MLP for all tokens is the only one."""

    architecture = "GraniteMoeHybridForCausalLM"
    gguf_arch = "granitehybrid"
    numbers: ClassVar[dict[str, str]] = Granite.numbers | {
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.group_count": "mamba_n_groups",
        "ssm.time_step_rank": "mamba_n_heads",
    }
    fixed: ClassVar[dict[str, Any]] = {"mamba_conv_bias": True, "mamba_proj_bias": False, "attention_bias": False}
    gguf_permute = Granite.gguf_permute
    mixture = None
    apart = True

    def renames(self, config: dict[str, Any]) -> Mapping[str, str]:
        """See `Conversion.renames`."""
        own = GraniteMoe.names if config.get("num_local_experts", 1) else {"shared_mlp": "feed_forward"}
        return {**super().renames(config), **own, "feed_forward.output_linear": "feed_forward.down_proj"}

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`: how wide MLPs are, and how many heads each block has."""
        check_steps(self.gguf_arch, config.get("time_step_limit"))
        heads, shared = int(config["num_key_value_heads"]), int(config["shared_intermediate_size"])
        experts = {key: int(config[field]) for key, field in EXPERTS.items()}
        return {
            "attention.head_count_kv": [heads if kind == ATTENTION else 0 for kind in config["layer_types"]],
            "ssm.inner_size": int(config["mamba_n_heads"]) * int(config["mamba_d_head"]),
            "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
            **(experts | {SHARED: shared} if config["num_local_experts"] else {WIDTH: shared}),
        }

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        arch = self.gguf_arch
        counts = metadata.get(f"{arch}.attention.head_count_kv")
        count = positive(metadata, f"{arch}.block_count")
        found = counts if isinstance(counts, list) else [counts] * count
        inner, heads, hidden = (
            positive(metadata, f"{arch}.{key}") for key in ("ssm.inner_size", "ssm.time_step_rank", "embedding_length")
        )
        return super().gguf_fields(metadata, tensors) | {
            "layer_types": [ATTENTION if several else STATE for several in found],
            **{field: metadata.get(f"{arch}.{key}") or 0 for key, field in EXPERTS.items()},
            "shared_intermediate_size": metadata.get(f"{arch}.{SHARED}") or metadata.get(f"{arch}.{WIDTH}"),
            "position_embedding_type": "rope" if metadata.get(f"{arch}.rope.scaling.finetuned", True) else None,
            "mamba_d_head": inner // heads,
            "mamba_expand": inner // hidden,
        }
