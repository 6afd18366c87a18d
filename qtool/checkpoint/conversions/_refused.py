"""Model types that llama.cpp loads and that are not written as GGUF all the same, and why."""

from __future__ import annotations

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "phimoe": "llama.cpp weighs a token's two experts by softmax over both, the model by one softmax for each",
    "granitemoe": "its experts are one matrix of gate and up each, which llama.cpp wants apart",
    "granitemoeshared": "its experts are one matrix of gate and up each, which llama.cpp wants apart",
    "granitemoehybrid": "its gate and up are one matrix, which llama.cpp wants apart",
    "llama4_text": "its experts are one transposed tensor, whose parts are not linear layers of transformers' class",
    "llama4": "its experts are one transposed tensor, whose parts are not linear layers of transformers' class",
    "gemma3n_text": "llama.cpp wants a row of per-layer embeddings for every token, and published models have fewer",
    "gemma3n": "llama.cpp wants a row of per-layer embeddings for every token, and published models have fewer",
    "qwen3_vl_moe": "its experts are one tensor, whose parts are not named as those of Qwen3-MoE",
}
"""By `model_type`."""
