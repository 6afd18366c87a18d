"""Rotary position embedding: what config.json says about it, in GGUF's words and back.

config.json has two spellings: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.errors import CheckpointError

REQUIRED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
    "longrope": {"original_max_position_embeddings"},
}
"""Kinds of scaling that GGUF can hold, and the numbers that each needs."""
FACTORS = ("long_factor", "short_factor")
"""Lists that longrope needs: what each frequency is divided by, in contexts beyond the original length and below it."""
OPTIONAL = {
    "yarn": {"original_max_position_embeddings", "beta_fast", "beta_slow"},
    "longrope": {*FACTORS, "factor", "attention_factor"},
}
NUMBERS = {field for fields in (*REQUIRED.values(), *OPTIONAL.values()) for field in fields if field not in FACTORS}
LLAMA3_TENSOR = "rope_freqs.weight"
LONGROPE_TENSORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
ROPE_TENSORS = (LLAMA3_TENSOR, *LONGROPE_TENSORS.values())
"""What GGUF stores beside the model's own tensors."""


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the parameters of that type, whichever way config.json spells them.

    Raises:
        CheckpointError: a number is missing or none.
    """
    told = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, found in told.items():
        if not isinstance(found, dict):
            raise CheckpointError(f"config.json: impossible {name}", wanted="an object", found=f"{found!r:.40}")
    fields = {**told["rope_scaling"], **told["rope_parameters"]}
    kind = fields.pop("type", "default")
    rope = {"rope_type": kind, "rope_theta": config.get("rope_theta") or 10000.0} | fields
    if not isinstance(rope["rope_type"], str):
        found = f"{rope['rope_type']!r:.40}"
        raise CheckpointError("config.json: impossible rope_type of the rotary embedding", wanted="text", found=found)
    if rope["rope_type"] in ("su", "longrope"):  # "su" is what Phi 3 called it before it had a name
        rope["rope_type"] = "longrope"
        outside = config.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = outside or rope.get("original_max_position_embeddings")
        for field in FACTORS:
            _check_factors(rope.get(field), field)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    numbers = {"rope_theta"} | REQUIRED.get(rope["rope_type"], set())
    numbers |= {field for field in NUMBERS if rope.get(field) is not None}
    for field in sorted(numbers):
        if not isinstance(rope.get(field), int | float) or not 0 < rope[field] < math.inf:
            found = f"{rope.get(field)!r:.40}"
            raise CheckpointError(f"config.json: impossible {field} of the rotary embedding", wanted="> 0", found=found)
    return rope


def _check_factors(values: Any, field: str) -> None:
    if not isinstance(values, list) or not all(
        isinstance(value, int | float) and 0 < value < math.inf for value in values
    ):
        what = f"config.json: impossible {field} of the rotary embedding"
        raise CheckpointError(what, wanted="a list of numbers > 0", found=f"{values!r:.40}")


def rope_metadata(
    config: dict[str, Any], kinds: Collection[str] = tuple(REQUIRED)
) -> dict[str, int | float | bool | str]:
    """GGUF keys below the architecture's name.

    Args:
        config: config.json.
        kinds: of scaling that llama.cpp knows for this architecture.

    Raises:
        CheckpointError: a kind of scaling that GGUF has no keys for.
    """
    rope = rope_parameters(config)
    kind = str(rope["rope_type"])
    if kind not in kinds:
        raise CheckpointError("GGUF cannot hold this rotary scaling", wanted=", ".join(kinds), found=kind[:40])
    allowed = {"rope_type", "rope_theta"} | REQUIRED[kind] | OPTIONAL.get(kind, set())
    if unknown := {key for key in set(rope) - allowed if rope[key] is not None}:
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
    if kind == "longrope":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        values["rope.scaling.attn_factor"] = _attention_factor(rope, config["max_position_embeddings"])
    return values


def truncates(config: dict[str, Any]) -> bool:
    """Whether the range of dimensions that YaRN blends is rounded to whole ones, as llama.cpp always does."""
    told = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    return not any(isinstance(found, dict) and found.get("truncate") is False for found in told)


def _attention_factor(rope: dict[str, Any], context: int) -> float:
    """What longrope multiplies queries and keys with after their rotation (https://arxiv.org/abs/2402.13753)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = float(rope["original_max_position_embeddings"])
    stretch = float(rope.get("factor") or context / original)
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def longrope_factors(config: dict[str, Any], dim: int) -> dict[str, Tensor]:
    """The two tensors that GGUF wants for longrope, float32 [dim / 2] each; none for other kinds of scaling.

    Raises:
        CheckpointError: a list has another length.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "longrope":
        return {}
    for field in FACTORS:
        if len(rope[field]) != dim // 2:
            what = f"config.json: {field} of the rotary embedding"
            raise CheckpointError(what, wanted=f"{dim // 2} numbers", found=len(rope[field]))
    return {name: torch.tensor(rope[field], dtype=torch.float32) for field, name in LONGROPE_TENSORS.items()}


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


def rope_config(metadata: dict[str, Any], arch: str, dim: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of config.json from a GGUF file.

    Args:
        metadata: the file's key-values.
        arch: its architecture, the prefix of the keys.
        dim: elements of a head that are rotated.
        tensors: those of `ROPE_TENSORS` that the file has, float32 [dim / 2] each.

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
    if tensors and kind != "none":
        raise CheckpointError(f"the GGUF file has both {min(tensors)} and rotary scaling {kind}")
    if LLAMA3_TENSOR in tensors:
        scaling = _llama3_from(tensors[LLAMA3_TENSOR], rope_parameters(fields)["rope_theta"], dim)
    elif tensors:
        lists = {field: [_decimal(v) for v in tensors[name].tolist()] for field, name in LONGROPE_TENSORS.items()}
        scaling |= {"rope_type": "longrope", **lists}
    fields |= {"rope_scaling": scaling} if scaling["rope_type"] != "none" else {}
    rope = rope_parameters(fields)
    stored, context = metadata.get(f"{arch}.rope.scaling.attn_factor"), metadata.get(f"{arch}.context_length")
    if scaling["rope_type"] == "longrope" and isinstance(stored, float):
        computed = _attention_factor(rope, context) if isinstance(context, int) else None
        if computed is None or not math.isclose(stored, computed, rel_tol=1e-6):
            scaling["attention_factor"] = _decimal(stored)
    return fields


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


LENGTHS = (8192, 4096, 2048, 16384, 32768, 65536, 131072, 262144, 1024, 512)
"""Original lengths that models with Llama 3's rule were trained on."""


def check_llama3(config: dict[str, Any], dim: int) -> None:
    """Raises CheckpointError: a GGUF file would have factors from which nobody finds back to the parameters."""
    rope = rope_parameters(config)
    factors = llama3_factors(config, dim)
    if factors is not None:
        try:
            _llama3_from(factors, float(rope["rope_theta"]), dim)
        except CheckpointError:
            found = {field: rope[field] for field in sorted(REQUIRED["llama3"])}
            wanted = "factors of Llama 3's rule that a reader of the file can tell"
            raise CheckpointError("GGUF cannot say this rotary scaling", wanted=wanted, found=found) from None


def _llama3_from(factors: Tensor, theta: float, dim: int) -> dict[str, Any]:
    """Parameters of Llama 3's rule that reproduce the tensor; those that Llama 3.1 to 3.3 use before others."""
    largest = float(factors.max())  # that of long waves; no wave of a small model may be long enough
    stretches = dict.fromkeys((largest, 8.0, 32.0, 16.0, 4.0, 2.0))
    choices = itertools.product((4.0, 8.0, 2.0, 16.0), (1.0, 2.0), stretches, LENGTHS)
    for high, low, factor, old in choices:
        if low >= high:
            continue
        rope: dict[str, Any] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
        rope |= {"high_freq_factor": high, "original_max_position_embeddings": old}
        computed = llama3_factors({"rope_parameters": rope | {"rope_theta": theta}}, dim)
        if computed is not None and computed.shape == factors.shape and torch.allclose(computed, factors, rtol=1e-5):
            return rope
    raise CheckpointError(
        "the GGUF file's rope_freqs.weight does not follow Llama 3's rule", hint="start from the original checkpoint"
    )
