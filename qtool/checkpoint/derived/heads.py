"""Sizes that config.json says, whatever a class calls them.

Shape letters: H attention heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT = ("text_config", "llm_config", "language_config")
"""Where configs of several parts describe the language model."""


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model."""
    return next((config[name] for name in TEXT if isinstance(config.get(name), dict)), config)


def heads_of(config: Mapping[str, Any], width: int) -> tuple[int, int, int]:
    """(H, G, D) of a model whose hidden states are so wide; 1 where config.json does not say."""
    text = text_fields(config)
    heads = max(next((text[name] for name in HEADS if isinstance(text.get(name), int)), 1), 1)
    kv_heads = next((text[name] for name in KV_HEADS if isinstance(text.get(name), int)), heads)
    return heads, max(min(kv_heads, heads), 1), int(text.get("head_dim") or max(width // heads, 1))


def rotary_dims(config: Mapping[str, Any], dim: int) -> tuple[int, ...]:
    """How many elements of a head of so many may be rotated."""
    text = text_fields(config)
    rope = text.get("rope_parameters")
    shares = [text.get("partial_rotary_factor"), text.get("rotary_pct")]
    shares += [rope.get("partial_rotary_factor")] if isinstance(rope, dict) else []
    part = [int(dim * share) for share in shares if isinstance(share, float | int)]
    return tuple(dict.fromkeys(n for n in (*part, dim) if 0 < n <= dim and n % 2 == 0))
