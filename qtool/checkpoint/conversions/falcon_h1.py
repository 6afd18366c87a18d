"""Falcon-H1: every block has attention and a state side by side."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._states import Recurrent, check_steps
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed

ONE = (
    *("attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier"),
    *("lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
)


class FalconH1(Recurrent):
    """`FalconH1ForCausalLM`. llama.cpp wants its multipliers inside of weights, where codes have no place for them."""

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
        **dict.fromkeys(ONE, 1.0),
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
        "mamba_rms_norm": False,
        "mamba_proj_bias": False,
        "projectors_bias": False,
    }
    columns = True

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        check_steps(self.gguf_arch, config.get("time_step_limit"))
        check_fixed(self.gguf_arch, config, {"attention_bias": False, "mlp_bias": False})
        return {}
