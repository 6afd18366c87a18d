"""Tiny random models of any type that transformers knows as a causal language model.

Nothing is known about a type but its configuration class: fields with usual names get small values, and a few types
that want something particular are listed.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_head": 4, "n_heads": 4, "num_heads": 4}
WIDTHS = {"hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embedding_size": 64, "word_embed_proj_dim": 64}
FEED_FORWARD = {"intermediate_size": 96, "n_inner": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "d_ff": 96, "d_inner": 96}
LAYERS = {"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4}
LENGTHS = {"max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256}
DECODER = {
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "is_decoder": True,
}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_group", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "num_nextn_predict_layers": 0,
}
RECURRENT = {
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size", "mamba_d_head"), 16
    ),
    **dict.fromkeys(("mamba_head_dim", "ssm_state_size", "chunk_size", "mamba_chunk_size", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_heads", "num_mamba_heads", "mamba_num_heads", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": 64,
}
OTHERS = {
    **dict.fromkeys(("sliding_window", "attention_window_size"), 16),
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEPTHS = {"num_hidden_layers", "depth", "num_layers"}
"""Of towers beside the language model, where one layer does."""
SMALL: dict[str, Any] = (
    HEADS | WIDTHS | FEED_FORWARD | LAYERS | LENGTHS | DECODER | EXPERTS | LATENT | RECURRENT | OTHERS
)
LATENT_KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3", "youtu", "axk1", "axk2")
PARTICULAR: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "intermediate_size": [96] * 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 24,
        "n_routed_experts": 4,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 24,
        "swa_qk_rope_head_dim": 8,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8, "num_layers": 2},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    **{kind: {"num_key_value_heads": 4} for kind in LATENT_KINDS},
}
"""What some types want."""


def tiny_config(kind: str, config_class: Any = None) -> Any:
    """A configuration of a model of some ten thousand weights.

    Args:
        kind: `model_type`.
        config_class: of it; None: transformers'.
    """
    config_class = config_class or CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    known -= set(getattr(config_class, "attribute_map", None) or {})
    fields = {name: value for name, value in SMALL.items() if name in known}
    for name, stated in (getattr(config_class, "sub_configs", None) or {}).items():
        part = stated if hasattr(stated, "model_type") else type(getattr(config_class(), name, None))
        if name in ("text_config", "decoder") and hasattr(part, "model_type"):
            fields[name] = tiny_config(part.model_type, part)
        elif name.endswith("_config") and hasattr(part, "__dataclass_fields__"):
            fields[name] = part(**dict.fromkeys(DEPTHS & part.__dataclass_fields__.keys(), 1))
    return config_class(**fields | PARTICULAR.get(kind, {}))


def save_tiny(kind: str, folder: Path) -> Any:
    """Saves a random model of a type in float32, with matrices that matter, and norms and biases as if trained.

    Returns:
        The model.
    """
    config = tiny_config(kind)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(kind))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
                elif "A_log" not in name and "dt" not in name:  # states that forget too fast, or never
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0  # where training leaves it
    model.save_pretrained(folder)
    return model
