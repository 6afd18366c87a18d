"""Rotary position embedding: what config.json says about it, in GGUF's words and back.

config.json has two spellings: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qtool.errors import CheckpointError

REQUIRED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
}
"""Kinds of scaling that GGUF can hold, and the numbers that each needs."""
OPTIONAL = {"yarn": {"original_max_position_embeddings", "beta_fast", "beta_slow"}}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the parameters of that type, whichever way config.json spells them.

    Raises:
        CheckpointError: a number is missing or none.
    """
    told = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = told.pop("type", "default")
    rope = {"rope_type": kind, "rope_theta": config.get("rope_theta") or 10000.0} | told
    for field in sorted({"rope_theta"} | REQUIRED.get(str(rope["rope_type"]), set())):
        if not isinstance(rope.get(field), int | float) or rope[field] <= 0:
            found = f"{rope.get(field)!r:.40}"
            raise CheckpointError(f"config.json: impossible {field} of the rotary embedding", wanted="> 0", found=found)
    return rope


def rope_metadata(config: dict[str, Any]) -> dict[str, int | float | bool | str]:
    """GGUF keys below the architecture's name.

    Raises:
        CheckpointError: a kind of scaling that GGUF has no keys for.
    """
    rope = rope_parameters(config)
    kind = str(rope["rope_type"])
    if kind not in REQUIRED:
        raise CheckpointError("GGUF cannot hold this rotary scaling", wanted=", ".join(REQUIRED), found=kind[:40])
    known = {"rope_type", "rope_theta"} | REQUIRED[kind] | OPTIONAL.get(kind, set())
    if unknown := {key for key in set(rope) - known if rope[key] is not None}:
        raise CheckpointError(f"GGUF cannot hold {', '.join(sorted(unknown))} of rotary scaling {kind}")
    values: dict[str, int | float | bool | str] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        values["rope.scaling.original_context_length"] = int(original)
        for beta in ("beta_fast", "beta_slow"):
            if rope.get(beta) is not None:
                values[f"rope.scaling.yarn_{beta}"] = float(rope[beta])
    return values


def llama3_factors(config: dict[str, Any], dim: int) -> Tensor | None:
    """Divisors of the rotary frequencies by Llama 3.1's rule, float32 [dim / 2]; None for other kinds of scaling.

    Wavelengths below old/high stay, above old/low are divided by `factor`, and in between the two are blended.
    Source: https://github.com/meta-llama/llama-models, apply_scaling.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old, factor = int(rope["original_max_position_embeddings"]), float(rope["factor"])
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def rope_config(metadata: dict[str, Any], arch: str, dim: int, factors: Tensor | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of config.json from a GGUF file.

    Args:
        metadata: the file's key-values.
        arch: its architecture, the prefix of the keys.
        dim: D.
        factors: the tensor `rope_freqs.weight`, float32 [D/2]; None if the file has none.

    Raises:
        CheckpointError: a kind of scaling that config.json has no words for.
    """
    fields: dict[str, Any] = {"rope_theta": metadata.get(f"{arch}.rope.freq_base", 10000.0)}
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    scaling: dict[str, Any] = {"rope_type": kind}
    for key, field in (
        ("factor", "factor"),
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if f"{arch}.rope.scaling.{key}" in metadata:
            scaling[field] = metadata[f"{arch}.rope.scaling.{key}"]
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError("the GGUF file uses an unknown rotary scaling", wanted="linear, yarn or none", found=kind)
    if factors is not None:
        if kind != "none":
            raise CheckpointError(f"the GGUF file has both rope_freqs.weight and rotary scaling {kind}")
        scaling = _llama3_from(factors, rope_parameters(fields)["rope_theta"], dim)
    fields |= {"rope_scaling": scaling} if scaling["rope_type"] != "none" else {}
    rope_parameters(fields)
    return fields


def _llama3_from(factors: Tensor, theta: float, dim: int) -> dict[str, Any]:
    """The parameters that Llama 3.1 to 3.3 use, with the factor and original length that reproduce the tensor."""
    for old in (8192, 4096, 2048, 16384, 32768, 1024, 512):
        rope: dict[str, Any] = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": old}
        computed = llama3_factors({"rope_parameters": rope | {"rope_theta": theta}}, dim)
        if computed is not None and computed.shape == factors.shape and torch.allclose(computed, factors, rtol=1e-5):
            return rope
    raise CheckpointError(
        "the GGUF file's rope_freqs.weight does not follow Llama 3's rule", hint="start from the original checkpoint"
    )
