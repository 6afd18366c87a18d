"""Attention with latent keys and values, as DeepSeek V2 and V3 have it.

Files are written so that llama.cpp decompresses keys and values for every head. It can keep latent ones as well, which
takes less of its cache, but wants one matrix of each head cut in two and turned for that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from qtool.checkpoint.conversions._experts import LateExperts
from qtool.checkpoint.families._base import Value
from qtool.checkpoint.families._gguf import check_fixed
from qtool.checkpoint.families._rope import rope_config
from qtool.errors import CheckpointError

LITE = 27
"""Blocks of the model whose queries are not latent."""
EPSILON, INNER = 1e-5, 1e-6
"""The largest epsilon of norms that makes no difference to the other one, which latent norms have in transformers."""


class Latent(LateExperts):
    """Heads have a part that is rotated and one that is not, and values of another length."""

    numbers: ClassVar[dict[str, str]] = LateExperts.numbers | {
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.value_length": "v_head_dim",
    }
    optional: ClassVar[dict[str, str]] = LateExperts.optional | {"attention.q_lora_rank": "q_lora_rank"}
    gguf_arch = "deepseek2"
    rope_kinds = ("default", "yarn")
    latent = True

    def heads(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """See `Conversion.heads`."""
        heads = int(config["num_attention_heads"])
        return heads, heads, int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])

    def rotary_dim(self, config: Mapping[str, Any]) -> int:
        """See `Conversion.rotary_dim`."""
        return int(config["qk_rope_head_dim"])

    def rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Conversion.rope`; scores are scaled by what is said of all dimensions, and llama.cpp is told that."""
        found = super().rope(config)
        rope = {field: value for field, value in found["rope_parameters"].items() if not field.startswith("mscale")}
        return found | {"rope_parameters": rope}

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        if not config.get("q_lora_rank"):  # llama.cpp tells such a model by its blocks
            check_fixed(self.gguf_arch, {"blocks": int(config["num_hidden_layers"])}, {"blocks": LITE})
        values = super().more(config) | {"attention.key_length": self.heads(config)[2]}
        values["attention.value_length"] = int(config["v_head_dim"])
        if (epsilon := config["rms_norm_eps"]) > EPSILON:
            what = f"llama.cpp adds rms_norm_eps in norms of latent keys as well, transformers {INNER}"
            raise CheckpointError(what, wanted=f"at most {EPSILON}", found=epsilon)
        rope = super().rope(config)["rope_parameters"]
        if rope["rope_type"] == "yarn":  # llama.cpp scales scores by one, and never rotated elements alone
            scales = {field: rope.get(field) or 0.0 for field in ("mscale", "mscale_all_dim")}
            if not scales["mscale"] == scales["mscale_all_dim"] > 0:
                wanted = "mscale and mscale_all_dim alike"
                raise CheckpointError("GGUF cannot hold this rotary scaling", wanted=wanted, found=scales)
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale"])
        return values

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        found = super().gguf_fields(metadata, tensors)
        found.pop("partial_rotary_factor", None)
        rotated = metadata.get("deepseek2.rope.dimension_count") or 0
        rope = rope_config(dict(metadata), self.gguf_arch, rotated, {})
        if scale := metadata.get("deepseek2.rope.scaling.yarn_log_multiplier"):
            scale = round(10 * scale, 6)
            rope["rope_scaling"] |= {"mscale": scale, "mscale_all_dim": scale}
        found |= rope
        found |= {"qk_rope_head_dim": rotated, "q_lora_rank": metadata.get("deepseek2.attention.q_lora_rank")}
        return found | {"qk_nope_head_dim": (metadata.get("deepseek2.attention.key_length") or 0) - rotated}
