"""Model types that llama.cpp loads and that are not written as GGUF all the same, and why."""

from __future__ import annotations

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "phimoe": "llama.cpp weighs a token's two experts by softmax over both, the model by one softmax for each",
    "gemma3n_text": "llama.cpp wants a row of per-layer embeddings for every token, and published models have fewer",
    "gemma3n": "llama.cpp wants a row of per-layer embeddings for every token, and published models have fewer",
}
"""By `model_type`."""
