"""What a KL divergence means in words, beside what well-known files cost a well-known model.

The anchors are llama.cpp's own measurements of Llama 3 8B against FP16 on Wikitext-2, without importance matrices:
https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md
Smaller models, and those trained on more text for their size, lose more by the same format: a divergence says how far
the answers are from the original's, whatever format it took.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Anchor(NamedTuple):
    """A published file: its name, mean KL divergence in nats per token, bits per weight, and what that feels like."""

    name: str
    kld: float
    bits: float
    words: str


MODEL = "Llama 3 8B"
ANCHORS = (
    Anchor("Q8_0", 0.001355, 8.5, "practically the original"),
    Anchor("Q6_K", 0.005452, 6.6, "a difference that only statistics show"),
    Anchor("Q5_K_M", 0.010762, 5.7, "a difference that is hard to notice"),
    Anchor("Q4_K_M", 0.031273, 4.9, "the usual price of four bits"),
    Anchor("Q3_K_M", 0.101913, 4.0, "noticeable where answers are long or exact"),
    Anchor("Q2_K", 0.445132, 3.2, "clearly worse than the original"),
)
BEYOND = "another model than the original"


def meaning(kld: float) -> str:
    """A divergence in words: "the usual price of four bits (between Q5_K_M and Q4_K_M of Llama 3 8B)"."""
    below = [anchor for anchor in ANCHORS if anchor.kld <= kld]
    above = next((anchor for anchor in ANCHORS if anchor.kld > kld), None)
    if not math.isfinite(kld) or above is None:
        return f"{BEYOND} (more than {ANCHORS[-1].name} of {MODEL})"
    if not below:
        return f"{above.words} (less than {above.name} of {MODEL})"
    return f"{above.words} (between {below[-1].name} and {above.name} of {MODEL})"
