"""Gemma 3n, the language model: four streams of hidden states, and embeddings for every block beside those of tokens.

Shape letters: G key/value heads, D head dimension, E hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.checkpoint.conversions._base import Conversion, check_layers, filled
from qtool.checkpoint.conversions._equal import Change, Equal
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import check_fixed, positive

PERIOD = ("sliding_attention",) * 4 + ("full_attention",)
OWN_KEYS, SPARSE = 20, 10
"""Blocks with keys and values of their own, and those whose activations are sparse; llama.cpp knows both by heart."""
SPARSITY = 0.95
PER_LAYER = "vocab_size_per_layer_input"


class Gemma3nText(Conversion):
    """`Gemma3nForCausalLM`.

    llama.cpp wants keys and values in all blocks, also where those of an earlier one are used. And it wants an
    embedding of every token for every block, of which published models have none of pictures and sounds; where
    transformers then takes that of token 0. Where activations are sparse, llama.cpp divides sums of squares by one less
    than there are numbers, which is 3e-5 to 6e-5 of a standard deviation in published models.
    """

    architecture = "Gemma3nForCausalLM"
    gguf_arch = "gemma3n"
    numbers: ClassVar[dict[str, str]] = {
        **{key: field for key, field in GGUF_FIELDS.items() if key != "feed_forward_length"},
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        "altup.num_inputs": "altup_num_inputs",
        "altup.active_idx": "altup_active_idx",
    }
    fixed: ClassVar[dict[str, Any]] = {
        "hidden_size_per_layer_input": 256,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "final_logit_softcapping": 30.0,
        "attention_bias": False,
    }
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    names: ClassVar[dict[str, str]] = {"correct_output_scale": "correct_output_scale.weight"}

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`."""
        count = int(config["num_hidden_layers"])
        check_layers(self.gguf_arch, config, PERIOD)
        sparse = [SPARSITY if i < SPARSE else 0.0 for i in range(count)]
        wide = list(config["intermediate_size"])
        wanted = {
            "num_kv_shared_layers": count - OWN_KEYS,
            "activation_sparsity_pattern": sparse,
            "intermediate_size": wide[:1] * count,
            PER_LAYER: config["vocab_size"],
        }
        check_fixed(self.gguf_arch, config, wanted)
        sliding = config["rope_parameters"]["sliding_attention"]
        check_fixed(self.gguf_arch, sliding, {"rope_type": "default", "partial_rotary_factor": 1.0})
        return {"feed_forward_length": int(wide[0]), "rope.freq_base_swa": float(sliding["rope_theta"])}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        rope = {"full_attention": "rope.freq_base", "sliding_attention": "rope.freq_base_swa"}
        bases = {kind: metadata.get(f"{self.gguf_arch}.{key}") for kind, key in rope.items()}
        return super().gguf_fields(metadata, tensors) | {
            "intermediate_size": positive(metadata, f"{self.gguf_arch}.feed_forward_length"),
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
            PER_LAYER: metadata.get(f"{self.gguf_arch}.vocab_size"),
        }

    def equal(self, config: Mapping[str, Any], tied: bool) -> Equal | None:
        """See `Conversion.equal`."""
        count = int(config["vocab_size"])
        if int(config[PER_LAYER]) >= count:
            return None
        changes = {"embed_tokens_per_layer.weight": Change(count=count)}
        return Equal({PER_LAYER: count}, changes, "embeddings for every block of all tokens")

    def extra_tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """See `Conversion.extra_tensors`: keys and values that nobody reads."""
        full = filled(config)
        _, kv_heads, dim = self.heads(full)
        unread = torch.zeros(kv_heads * dim, int(full["hidden_size"]), dtype=torch.float16)
        found = super().extra_tensors(config)
        for i in range(OWN_KEYS, int(full["num_hidden_layers"])):
            found |= {f"blk.{i}.attn_{part}.weight": unread for part in "kv"}
            found[f"blk.{i}.attn_k_norm.weight"] = torch.ones(dim)
        return found
