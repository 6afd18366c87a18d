"""`quantization_config` of config.json: which modules are quantized, and how.

Only keys that every compressed-tensors from 0.15 and vLLM's own copy know are written, because readers refuse unknown
ones. Readers disagree on which of two matching targets wins, so no module matches two.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from qtool.artifact._targets import kept_linears, patterns
from qtool.artifact.compressed_tensors import _cache, _transforms
from qtool.artifact.compressed_tensors._floats import (
    EXPONENT,
    LOCAL,
    FloatQuantized,
    MXFP4Packed,
    MXFP6Packed,
    MXFP8Quantized,
    NaiveQuantized,
    NVFP4Packed,
)
from qtool.artifact.compressed_tensors._integers import IntQuantized, PackQuantized
from qtool.artifact.compressed_tensors._kinds import (
    FP8_BLOCK_INPUTS,
    FP8_INPUTS,
    INT8_INPUTS,
    STATIC_FP8,
    STATIC_INT8,
    Arguments,
    Compressor,
    spelled,
)
from qtool.checkpoint._base import Layer, QuantizedCheckpoint
from qtool.checkpoint.families._parts import stacked
from qtool.formats._base import Format, alike
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxfp8 import MXFP8
from qtool.formats.nvfp4 import NVFP4

METHOD = "compressed-tensors"

KINDS: dict[str, Compressor] = {
    kind.name: kind
    for kind in (
        PackQuantized(),
        IntQuantized(),
        FloatQuantized(),
        NaiveQuantized(),
        MXFP4Packed(),
        MXFP6Packed(),
        MXFP8Quantized(),
        NVFP4Packed(),
    )
}

INPUTS: tuple[tuple[Format, dict[str, Any]], ...] = (
    (INT8_INPUTS[0], spelled(8, "int", "token", dynamic=True)),
    (INT8_INPUTS[1], spelled(8, "int", "token", symmetric=False, dynamic=True)),
    (FP8_INPUTS, spelled(8, "float", "token", dynamic=True)),
    (STATIC_INT8[0], spelled(8, "int", "tensor")),
    (STATIC_INT8[1], spelled(8, "int", "tensor", symmetric=False)),
    (STATIC_FP8, spelled(8, "float", "tensor")),
    (FP8_BLOCK_INPUTS, spelled(8, "float", "group", 128, dynamic=True)),
    (MXFP8(), spelled(8, "float", "group", 32, dynamic=True, scale_dtype=EXPONENT)),
    (MXFP4(), spelled(4, "float", "group", 32, dynamic=True, scale_dtype=EXPONENT)),
    (NVFP4(), spelled(4, "float", "tensor_group", 16, dynamic="local", scale_dtype=LOCAL)),
)
"""Inputs, and what config.json says of them."""


def kind_of(layer: Layer) -> Compressor | None:
    """The layout that holds a layer; None if none does."""
    for kind in KINDS.values():
        allowed = kind.inputs(layer.format)
        if allowed is not None and any(_same(inputs, layer.activations) for inputs in allowed):
            return kind
    return None


def refusal(layer: Layer) -> str:
    """Why no layout holds a layer."""
    found = [kind.inputs(layer.format) for kind in KINDS.values()]
    if all(inputs is None for inputs in found):
        wanted = "integers such as int4-g128 and int8-channel, fp8-channel, fp8-tensor, fp8-block, mx floats, nvfp4"
        return f"compressed-tensors holds {wanted}, not {layer.format.label}"
    allowed = [inputs for kind in found for inputs in kind or ()]
    labels = dict.fromkeys(_spell(inputs) for inputs in sorted(allowed, key=lambda inputs: inputs is None))
    return f"inputs of {layer.format.label} weights are {' or '.join(labels)}, not {_spell(layer.activations)}"


def _same(a: Format | None, b: Format | None) -> bool:
    return a is b if a is None or b is None else alike(a, b)


def _spell(inputs: Format | None) -> str:
    return "left alone" if inputs is None else inputs.label


def quantization_config(model: QuantizedCheckpoint) -> dict[str, Any]:
    """What config.json says about a model all of whose layers have a layout."""
    members: dict[str, list[str]] = defaultdict(list)
    schemes: dict[str, dict[str, Any]] = {}
    for module, layer in model.layers.items():
        scheme = _scheme(layer)
        key = json.dumps(scheme, sort_keys=True)
        schemes[key] = scheme
        members[key].append(module)
    groups = {}
    # transformers (5.23) decodes experts by the first group with a target that says "experts", be it of shared ones.
    order = sorted(schemes, key=lambda key: not any(stacked(module)[1] is not None for module in members[key]))
    for i, (key, scheme) in enumerate((key, schemes[key]) for key in order):
        targets = ["Linear"] if len(schemes) == 1 else [f"re:{target}" for target in patterns(members[key], model)]
        groups[f"group_{i}"] = {**scheme, "targets": targets}
    formats = {scheme["format"] for scheme in schemes.values()}
    asymmetric = not all(scheme["weights"]["symmetric"] for scheme in schemes.values())
    config = {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": _version(model.layers.values()),
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        _cache.SCHEME: _cache.settings(model),
        "config_groups": groups,
        "ignore": kept_linears(model),
    }
    config |= _transforms.settings(model)
    if asymmetric and len(schemes) == 1:
        # transformers (5.23, compressed-tensors 0.20) makes room for unpacked zero points where the file has packed
        # ones, unless it decodes while it loads; then it decodes everything by the first group. vLLM ignores the key.
        config["dequantize"] = True
    return config


def _version(layers: Iterable[Layer]) -> str:
    """The oldest version that decodes these layers."""
    found = [kind.since(layer.format) for layer in layers if (kind := kind_of(layer))]
    return max(found, key=lambda version: [int(part) for part in version.split(".")])


def _scheme(layer: Layer) -> dict[str, Any]:
    kind = kind_of(layer)
    assert kind is not None
    inputs = layer.activations
    return {
        "format": kind.name,
        "weights": kind.arguments(layer.format),
        "input_activations": None
        if inputs is None
        else next(declared for fmt, declared in INPUTS if alike(fmt, inputs)),
        "output_activations": None,
    }


def input_format(declared: Arguments) -> Format | None:
    """The format of inputs that config.json describes; None: no such format."""
    for fmt, keys in INPUTS:
        wanted = Arguments.model_validate({k: v for k, v in keys.items() if v is not None})
        if (declared.grouping, *_content(declared)) == (wanted.grouping, *_content(wanted)):
            return fmt
    return None


def _content(declared: Arguments) -> tuple[Any, ...]:
    return declared.num_bits, declared.type, declared.symmetric, declared.group_size, declared.dynamic
