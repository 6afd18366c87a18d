"""Falcon-H1: every block has attention and a state side by side.

Shape letters: N rows of the matrix in front of states: gates, inputs, two for each group, steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.checkpoint.conversions._equal import Change, Equal
from qtool.checkpoint.conversions._states import Mamba, check_steps
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed

ONE = (
    *("attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier"),
    *("lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
)
NONE: Mapping[str, Any] = {**dict.fromkeys(ONE, 1.0), "mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}
"""What config.json says where nothing is multiplied."""


class FalconH1(Mamba):
    """`FalconH1ForCausalLM`. llama.cpp wants its multipliers inside of weights."""

    architecture = "FalconH1ForCausalLM"
    gguf_arch = "falcon-h1"
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS | {
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.group_count": "mamba_n_groups",
        "ssm.time_step_rank": "mamba_n_heads",
        "ssm.inner_size": "mamba_d_ssm",
    }
    fixed: ClassVar[dict[str, Any]] = {
        **NONE,
        "mamba_proj_bias": False,
        "projectors_bias": False,
    }

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        check_steps(self.gguf_arch, config.get("time_step_limit"))
        normed = {"mamba_norm_before_gate": False} if config["mamba_rms_norm"] else {}
        check_fixed(self.gguf_arch, config, {"attention_bias": False, "mlp_bias": False, **normed})
        return {}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        own = {"mamba_rms_norm": "blk.0.ssm_norm.weight" in tensors, "mamba_norm_before_gate": False}
        return super().gguf_fields(metadata, tensors) | own

    def equal(self, config: Mapping[str, Any], tied: bool) -> Equal | None:
        """See `Conversion.equal`."""
        changes = {end: Change(factors) for end, factors in factors_of(config).items() if not bool(factors.eq(1).all())}
        if not changes:
            return None
        untied = tied and config["embedding_multiplier"] != config["lm_head_multiplier"]
        fields = {**NONE, **({"tie_word_embeddings": False} if untied else {})}
        return Equal(fields, changes, "multipliers as part of weights", untied)


def factors_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What rows of tensors are multiplied with, float64 [N] or [1], by how their names end."""
    read, wide, groups = config["attention_in_multiplier"], int(config["mamba_d_ssm"]), int(config["mamba_n_groups"])
    both = groups * int(config["mamba_d_state"])
    rows = torch.tensor([wide, wide, both, both, int(config["mamba_n_heads"])])
    states = torch.tensor(config["ssm_multipliers"], dtype=torch.float64).repeat_interleave(rows)
    single = {
        "embed_tokens.weight": config["embedding_multiplier"],
        "lm_head.weight": config["lm_head_multiplier"],
        "self_attn.q_proj.weight": read,
        "self_attn.k_proj.weight": read * config["key_multiplier"],
        "self_attn.v_proj.weight": read,
        "self_attn.o_proj.weight": config["attention_out_multiplier"],
        "mamba.out_proj.weight": config["ssm_out_multiplier"],
        "feed_forward.gate_proj.weight": config["mlp_multipliers"][0],
        "feed_forward.down_proj.weight": config["mlp_multipliers"][1],
    }
    found = {end: torch.tensor([factor], dtype=torch.float64) for end, factor in single.items()}
    return found | {"mamba.in_proj.weight": states * config["ssm_in_multiplier"]}
