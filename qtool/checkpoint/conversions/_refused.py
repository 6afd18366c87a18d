"""Model types that llama.cpp loads and that are not written as GGUF all the same, and why."""

from __future__ import annotations

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "phimoe": "llama.cpp weighs a token's two experts by softmax over both, the model by one softmax for each",
}
"""By `model_type`."""
