"""Matrices that llama.cpp multiplies with a scale of their own, as it told `benchmarks/gguf_scales.py`."""

from __future__ import annotations

from collections.abc import Mapping

SCALED: Mapping[str, str] = {
    "arcee": ("attn_k attn_output attn_q attn_v"),
    "chatglm": ("attn_k attn_output attn_q attn_v"),
    "cohere2": ("attn_k attn_output attn_q attn_v ffn_down ffn_gate ffn_up"),
    "command-r": ("attn_k attn_output attn_q attn_v"),
    "deepseek2": ("attn_output"),
    "dots1": ("attn_k attn_output attn_q attn_v"),
    "ernie4_5": ("attn_k attn_output attn_q attn_v"),
    "ernie4_5-moe": ("attn_k attn_output attn_q attn_v"),
    "exaone4": ("attn_k attn_output attn_q attn_v"),
    "falcon-h1": ("attn_k attn_output attn_q attn_v ssm_in ssm_out"),
    "gemma": ("attn_k attn_output attn_q attn_v"),
    "gemma2": ("attn_k attn_output attn_q attn_v"),
    "gemma3": ("attn_k attn_output attn_q attn_v"),
    "gemma4": ("attn_k attn_output attn_q attn_v ffn_down ffn_gate ffn_up"),
    "glm4": ("attn_k attn_output attn_q attn_v"),
    "glm4moe": ("attn_k attn_output attn_q attn_v"),
    "gpt-oss": ("attn_k attn_output attn_q attn_v"),
    "gptneox": ("attn_output attn_qkv"),
    "granite": ("attn_k attn_output attn_q attn_v"),
    "granitehybrid": ("attn_k attn_output attn_q attn_v ssm_in ssm_out"),
    "granitemoe": ("attn_k attn_output attn_q attn_v"),
    "hunyuan-dense": ("attn_k attn_output attn_q attn_v"),
    "hunyuan-moe": ("attn_k attn_output attn_q attn_v"),
    "lfm2": ("attn_k attn_output attn_q attn_v"),
    "lfm2moe": ("attn_k attn_output attn_q attn_v"),
    "llama": ("attn_k attn_output attn_q attn_v ffn_down ffn_down_exps ffn_gate ffn_gate_exps ffn_up ffn_up_exps"),
    "llama4": ("attn_k attn_output attn_q attn_v"),
    "mamba2": ("ssm_in ssm_out"),
    "minimax-m2": ("attn_k attn_output attn_q attn_v"),
    "nemotron": ("attn_k attn_output attn_q attn_v"),
    "olmo": ("attn_k attn_output attn_q attn_v"),
    "olmo2": ("attn_k attn_output attn_q attn_v"),
    "olmoe": ("attn_k attn_output attn_q attn_v"),
    "phi2": ("attn_k attn_output attn_q attn_v"),
    "phi3": ("attn_output attn_qkv"),
    "qwen2": ("attn_k attn_output attn_q attn_v"),
    "qwen2moe": ("attn_k attn_output attn_q attn_v"),
    "qwen3": ("attn_k attn_output attn_q attn_v ffn_down ffn_gate ffn_up"),
    "qwen35": (
        "attn_gate attn_k attn_output attn_q attn_qkv attn_v ffn_down ffn_gate ffn_up ssm_alpha ssm_beta ssm_out"
    ),
    "qwen35moe": (
        "attn_gate attn_k attn_output attn_q attn_qkv attn_v ffn_down_exps ffn_down_shexp "
        "ffn_gate_exps ffn_gate_shexp ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta ssm_out"
    ),
    "qwen3moe": ("attn_k attn_output attn_q attn_v ffn_down_exps ffn_gate_exps ffn_up_exps"),
    "qwen3next": (
        "attn_k attn_output attn_q attn_v ffn_down_exps ffn_down_shexp ffn_gate_exps ffn_gate_shexp "
        "ffn_up_exps ffn_up_shexp"
    ),
    "seed_oss": ("attn_k attn_output attn_q attn_v"),
    "smollm3": ("attn_k attn_output attn_q attn_v"),
    "stablelm": ("attn_k attn_output attn_q attn_v"),
    "starcoder2": ("attn_k attn_output attn_q attn_v"),
}
"""Architecture -> what GGUF calls the tensors whose scale it applies, below their block."""
