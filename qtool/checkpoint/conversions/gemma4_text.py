"""Gemma 4, dense, the language model: heads of full attention are longer, and a part of their frequencies is zero."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.checkpoint.conversions._base import Conversion, filled
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed
from qtool.checkpoint.families._rope import LLAMA3_TENSOR
from qtool.errors import CheckpointError

LISTS = ("feed_forward_length", "attention.head_count_kv")
"""Keys that may differ between blocks."""
NEVER = 1e30
"""What frequencies are divided by that do not turn."""
CAP = "final_logit_softcapping"
SLIDING, FULL = "sliding_attention", "full_attention"


class Gemma4Text(Conversion):
    """`Gemma4ForCausalLM`."""

    architecture = "Gemma4ForCausalLM"
    gguf_arch = "gemma4"
    numbers: ClassVar[dict[str, str]] = {
        **{key: field for key, field in GGUF_FIELDS.items() if key not in LISTS},
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    }
    fixed: ClassVar[dict[str, Any]] = {"attention_bias": False, "enable_moe_block": False}
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    names: ClassVar[dict[str, str]] = {"layer_scalar": "layer_scalar.weight"}
    own_factors = True

    def of_block(self, config: Mapping[str, Any], i: int, field: str) -> int:
        """A field of a block, which some say by themselves."""
        own = config.get("per_layer_config") or {}
        return int((own.get(str(i)) or own.get(i) or {}).get(field) or config[field])

    def full_dim(self, config: Mapping[str, Any]) -> int:
        """Elements of a head of full attention; the last block always has it."""
        return self.of_block(config, int(config["num_hidden_layers"]) - 1, "head_dim")

    def rotary_dim(self, config: Mapping[str, Any]) -> int:
        """See `Conversion.rotary_dim`."""
        return self.full_dim(config)

    def metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.metadata`."""
        full = filled(config)
        count, kinds, rope = int(full["num_hidden_layers"]), full["layer_types"], full["rope_parameters"]
        field, wanted = self.activation
        kept = {"use_bidirectional_attention": False if full.get("use_bidirectional_attention") == "all" else None}
        check_fixed(self.gguf_arch, full | kept, self.fixed | {field: wanted, "use_bidirectional_attention": None})
        if full["hidden_size_per_layer_input"]:
            check_fixed(self.gguf_arch, full, {"vocab_size_per_layer_input": full["vocab_size"]})
        check_fixed(self.gguf_arch, rope[FULL], {"rope_type": "proportional", "factor": 1.0})
        check_fixed(self.gguf_arch, rope[SLIDING], {"rope_type": "default", "partial_rotary_factor": 1.0})
        values: dict[str, Value] = {key: full[field] for key, field in self.numbers.items()}
        values[CAP] = float(full.get(CAP) or 0.0)  # llama.cpp assumes 30 where a file does not say it
        values["attention.layer_norm_rms_epsilon"] = float(full["rms_norm_eps"])
        wide, shared = int(full["intermediate_size"]), count - int(full["num_kv_shared_layers"])
        twice = 2 if full.get("use_double_wide_mlp") else 1
        own = [i for i in range(count) if self.of_block(full, i, "head_dim") != self.dim(full, kinds[i])]
        if own:
            raise CheckpointError("llama.cpp knows one length of heads of each kind", found=f"block {own[0]}")
        values["feed_forward_length"] = [wide * (1 if i < shared else twice) for i in range(count)]
        values["attention.head_count_kv"] = [self.of_block(full, i, "num_key_value_heads") for i in range(count)]
        values["attention.sliding_window_pattern"] = [int(kind == SLIDING) for kind in kinds]
        for part in ("key", "value"):
            values[f"attention.{part}_length"] = self.full_dim(full)
            values[f"attention.{part}_length_swa"] = int(full["head_dim"])
        values |= {"rope.dimension_count": self.full_dim(full), "rope.dimension_count_swa": int(full["head_dim"])}
        bases = {"rope.freq_base": FULL, "rope.freq_base_swa": SLIDING}
        return values | {key: float(rope[kind]["rope_theta"]) for key, kind in bases.items()}

    def dim(self, config: Mapping[str, Any], kind: str) -> int:
        """Elements of a head of a kind of attention."""
        return int(config["head_dim"]) if kind == SLIDING else self.full_dim(config)

    def extra_tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """See `Conversion.extra_tensors`."""
        full = filled(config)
        half = self.full_dim(full) // 2
        share = full["rope_parameters"][FULL].get("partial_rotary_factor", 1.0)
        factors = torch.full((half,), NEVER)
        factors[: int(share * self.full_dim(full) // 2)] = 1.0
        return {LLAMA3_TENSOR: factors}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""

        def said(key: str) -> Any:
            return metadata.get(f"{self.gguf_arch}.{key}")

        pattern, widths, heads = said("attention.sliding_window_pattern"), said(LISTS[0]), said(LISTS[1])
        if not all(isinstance(found, list) and found for found in (pattern, widths, heads)):
            raise CheckpointError("the metadata lacks what it says of each block", wanted=", ".join(LISTS))
        kinds = [SLIDING if slides else FULL for slides in pattern]
        usual = next((n for n, kind in zip(heads, kinds, strict=False) if kind == SLIDING), heads[0])
        own = {"head_dim": said("attention.key_length")}
        others = {str(i): own | {"num_key_value_heads": heads[i]} for i, kind in enumerate(kinds) if kind == FULL}
        rope = {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": said("rope.freq_base")},
            SLIDING: {"rope_type": "default", "rope_theta": said("rope.freq_base_swa")},
        }
        return {
            **self.fixed,
            CAP: said(CAP) or None,
            "layer_types": kinds,
            "num_key_value_heads": usual,
            "head_dim": said("attention.key_length_swa"),
            "per_layer_config": others,
            "intermediate_size": widths[0],
            "use_double_wide_mlp": widths[-1] != widths[0],
            "rope_parameters": rope,
            "vocab_size_per_layer_input": said("vocab_size"),
            "attention_k_eq_v": any(
                f"blk.{i}.attn_k.weight" in tensors and f"blk.{i}.attn_v.weight" not in tensors for i in others
            ),
        }
