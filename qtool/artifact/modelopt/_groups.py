"""What config.json says of a ModelOpt checkpoint since ModelOpt 0.29: `config_groups`, as llm-compressor spells them.

Source: https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/export/convert_hf_config.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
FP4 = {"dynamic": False, "num_bits": 4, "type": "float"}
INT4 = {"dynamic": False, "num_bits": 4, "type": "int"}
INT8 = {"dynamic": False, "num_bits": 8, "type": "int"}
SCHEMES: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None, int | None]] = {
    "FP8": (FP8, FP8, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8 | {"strategy": "channel"}, FP8, None),
    "MXFP8": (FP8, FP8, 32),
    "NVFP4": (FP4, FP4, 16),
    "W4A16_NVFP4": (FP4, None, 16),
    "W4A16_AWQ": (INT4, None, 128),
    "W8A16": (INT8, None, None),
    "W8A8_SQ_PER_CHANNEL": (INT8 | {"strategy": "channel"}, INT8, None),
}
"""Algorithm -> how weights are stored, inputs (None: as they are), and how many columns usually share a scale."""
CACHE = FP8
"""`kv_cache_scheme` of a cache in FP8."""


def group(keys: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """One group; of an algorithm that has no spelling there, its name.

    Args:
        keys: what hf_quant_config.json says of its layers.
        targets: names of layers, or of classes of them.
    """
    algo = str(keys["quant_algo"])
    if algo not in SCHEMES:
        return {"quant_algo": algo, "targets": targets}
    weights, inputs, usual = SCHEMES[algo]
    size = {"group_size": keys.get("group_size") or usual} if usual else {}
    found = {"weights": weights | size, "targets": targets}
    return found if inputs is None else {"input_activations": inputs | size, **found}


def config_groups(how: Mapping[str, Any]) -> dict[str, Any]:
    """All of them; layers that are quantized in the same way share one.

    Args:
        how: `quantization` of hf_quant_config.json.
    """
    if "quantized_layers" not in how:
        return {"group_0": group(how, ["Linear"])}
    members: dict[str, list[str]] = {}
    layers: Mapping[str, Mapping[str, Any]] = how["quantized_layers"]
    for module, keys in layers.items():
        members.setdefault(repr(sorted(keys.items())), []).append(module)
    return {f"group_{i}": group(layers[names[0]], sorted(names)) for i, names in enumerate(members.values())}
