"""Mamba 2: states only, with neither attention nor MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import filled
from qtool.checkpoint.conversions._states import Recurrent, check_steps
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import Form, check_fixed, positive


class Mamba2(Recurrent):
    """`Mamba2ForCausalLM`. The norm behind the states is over all groups in transformers, in llama.cpp over each."""

    architecture = "Mamba2ForCausalLM"
    gguf_arch = "mamba2"
    numbers: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "state_size",
        "ssm.group_count": "n_groups",
        "ssm.time_step_rank": "num_heads",
    }
    fixed: ClassVar[dict[str, Any]] = {"n_groups": 1, "use_bias": False, "use_conv_bias": True}
    attends = False
    columns = True

    def rotary_dim(self, config: Mapping[str, Any]) -> int:
        """See `Conversion.rotary_dim`."""
        return 0

    def metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.metadata`."""
        full = filled(config)
        check_fixed(self.gguf_arch, full, self.fixed | {"hidden_act": "silu"})
        check_steps(self.gguf_arch, full.get("time_step_limit"))
        values: dict[str, Value] = {key: full[field] for key, field in self.numbers.items()}
        values["attention.layer_norm_rms_epsilon"] = float(full["layer_norm_epsilon"])
        inner = int(full["num_heads"]) * int(full["head_dim"])
        zeros = {"feed_forward_length": 0, "attention.head_count": 0}
        return values | zeros | {"ssm.inner_size": inner, "context_length": 1 << 20}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        inner, heads, hidden = (
            positive(metadata, f"mamba2.{key}") for key in ("ssm.inner_size", "ssm.time_step_rank", "embedding_length")
        )
        return self.fixed | {"head_dim": inner // heads, "expand": inner // hidden}

    def form(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Form | None:
        """See `Conversion.form`."""
        groups = int(config["n_groups"])
        return Form((groups, shape[0] // groups)) if "mixer.norm" in name else super().form(config, name, shape)
