"""Phi 3 to 4, dense: q, k and v in one matrix, gate and up in another, long contexts by LongRoPE.

Source: https://huggingface.co/docs/transformers/model_doc/phi3
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from qtool.checkpoint.families._base import Family, Value
from qtool.checkpoint.families._gguf import check_fixed, positive
from qtool.checkpoint.families._parts import Linear
from qtool.checkpoint.families._rope import longrope_factors
from qtool.errors import CheckpointError


class Phi3(Family):
    """`Phi3ForCausalLM`."""

    architecture = "Phi3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    linears = (
        Linear("self_attn.qkv_proj", "qkv", "attn_in"),
        Linear("self_attn.o_proj", "o", "attn_out"),
        Linear("mlp.gate_up_proj", "gate_up", "mlp_in"),
        Linear("mlp.down_proj", "down", "mlp_mid"),
    )
    rope_kinds = ("default", "longrope")
    gguf_arch = "phi3"

    def linear_shape(self, config: dict[str, Any], linear: Linear) -> tuple[int, int]:
        """See `Family.linear_shape`."""
        heads, kv_heads, dim = self.heads(config)
        if linear.role == "qkv":
            return (heads + 2 * kv_heads) * dim, int(config["hidden_size"])
        if linear.role == "gate_up":
            return 2 * int(config["intermediate_size"]), int(config["hidden_size"])
        return super().linear_shape(config, linear)

    def rotary_dim(self, config: dict[str, Any]) -> int:
        """See `Family.rotary_dim`: a share of the head."""
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        dim = self.heads(config)[2]
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise CheckpointError(
                "config.json: impossible partial_rotary_factor", wanted="0 to 1", found=repr(share)[:40]
            )
        return int(dim * share)

    def rope(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.rope`; the share that is rotated is not part of it."""
        fields = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope = {field: value for field, value in fields.items() if field != "partial_rotary_factor"}
        return config | {"rope_scaling": None, "rope_parameters": rope}

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`. llama.cpp reads a sliding window, and lets attention see everything all the same.

        Raises:
            CheckpointError: see there; or heads of another length than llama.cpp takes for granted.
        """
        heads, _, dim = self.heads(config)
        check_fixed("phi3", {"head_dim": dim}, {"head_dim": config["hidden_size"] / heads})
        window = int(config.get("sliding_window") or 0)
        return super().gguf_metadata(config) | {"phi3.attention.sliding_window": window}

    def gguf_window(self, config: dict[str, Any]) -> int | None:
        """See `Family.gguf_window`."""
        return config.get("sliding_window") or None

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        fields: dict[str, Any] = {"sliding_window": metadata.get("phi3.attention.sliding_window") or None}
        if original := metadata.get("phi3.rope.scaling.original_context_length"):
            fields["original_max_position_embeddings"] = original
        dim = positive(metadata, "phi3.embedding_length") // positive(metadata, "phi3.attention.head_count")
        return fields | {"partial_rotary_factor": metadata.get("phi3.rope.dimension_count", dim) / max(1, dim)}

    def gguf_extra_tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """See `Family.gguf_extra_tensors`."""
        return longrope_factors(self.rope(config), self.rotary_dim(config))
