"""Which of its runtimes cannot read all that compressed-tensors can say, or compute something else of it.

What transformers 5.23 does was tried. vLLM 0.32 was asked what it selects for recipes (docs/runtimes.md); of experts
its source was read, get_moe_method in vllm/model_executor/layers/quantization/compressed_tensors.
https://github.com/vllm-project/vllm
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import commonpath

import torch

from qtool.artifact._base import naming
from qtool.artifact._integers import model_dtype
from qtool.artifact.compressed_tensors._config import kind_of
from qtool.artifact.compressed_tensors._floats import (
    FloatQuantized,
    MXFP4Packed,
    MXFP6Packed,
    MXFP8Quantized,
    MXQuantized,
    NaiveQuantized,
    NVFP4Packed,
)
from qtool.artifact.compressed_tensors._initialized import looked_for
from qtool.artifact.compressed_tensors._integers import IntQuantized, PackQuantized, as_int
from qtool.artifact.compressed_tensors._kinds import FP8_INPUTS, INT8_INPUTS
from qtool.checkpoint._base import Checkpoint, Layer
from qtool.checkpoint.families._parts import stacked
from qtool.checkpoint.modules import own_modules
from qtool.formats._base import alike
from qtool.formats.int import Int

WIDTHS = (4, 8)
"""Bits of experts' integers that vLLM has kernels for."""
GROUP = 128
"""Columns of a group in vLLM's kernel for 4-bit weights with FP8 inputs."""


def caveats(model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
    """See `Artifact.caveats`."""
    found = set(layers.values())
    experts = {layer for name, layer in layers.items() if stacked(name)[1] is not None}
    others = {layer for name, layer in layers.items() if stacked(name)[1] is None}
    supported = PackQuantized | FloatQuantized | MXFP4Packed | MXFP6Packed
    loaded = {layer for layer in experts if isinstance(kind_of(layer), supported) and not asymmetric(layer)}
    scaled_twice = {layer for layer in experts if isinstance(kind_of(layer), NVFP4Packed)}
    decoded = {layer for layer in found if isinstance(kind_of(layer), MXQuantized | NVFP4Packed)}
    kept = any(module.expert is not None and module.name not in layers for module in own_modules(model))
    return naming(
        {
            **_looked_for(model, layers),
            "transformers loses the scales of whole matrices of experts in {}; vLLM reads them": scaled_twice,
            "transformers does not load experts in {}": experts - loaded - scaled_twice,
            "transformers decodes experts in one format only, not in {}": experts
            if len({layer.label for layer in experts}) > 1
            else set(),
            "transformers does not load experts that are kept where others are in {}": experts if kept else set(),
            "transformers leaves the inputs of experts in {} unrounded": {
                layer for layer in loaded if layer.activations
            },
            "transformers does not load {} beside other formats; vLLM does": {
                layer for layer in found if len(found) > 1 and asymmetric(layer)
            },
            "transformers decodes {} to bfloat16: load the model with dtype=torch.bfloat16": {
                layer for layer in decoded if model_dtype(model) != torch.bfloat16
            },
            "transformers leaves out the Hadamard matrices in front of {}, and computes something else": {
                layer for layer in found if layer.input_ops
            },
            "vLLM does the Hadamard matrices in front of {} on one GPU, in layers without a bias": {
                layer for layer in found if layer.input_ops
            },
            "vLLM does not know {}; transformers does, with compressed-tensors 0.20": {
                layer for layer in found if isinstance(kind_of(layer), MXFP6Packed)
            },
            "with run_compressed=True transformers does not load {}: leave that out": {
                layer for layer in found if asymmetric(layer) and isinstance(kind_of(layer), PackQuantized)
            },
            "vLLM loads {} from compute capability 8.0 on": {
                layer for layer in found if isinstance(kind_of(layer), MXFP4Packed)
            },
            "before compute capability 8.9 vLLM leaves inputs of {} unrounded": {
                layer for layer in found if _w8a8_fp8(layer)
            },
            "vLLM runs {} on Hopper GPUs only": {layer for layer in found if _w4a8(layer) and _vllm_runs(layer)},
            "vLLM does not load {}; transformers does": {layer for layer in others if not _vllm_runs(layer)},
            "vLLM does not load experts in {}": {layer for layer in experts if not _vllm_runs_experts(layer)},
            "vLLM leaves it to the GPU whether inputs of {} are rounded as well": {
                layer
                for layer in found
                if isinstance(kind_of(layer), MXFP8Quantized | MXFP4Packed) and layer.activations is None
            },
        }
    )


def _looked_for(model: Checkpoint, layers: Mapping[str, Layer]) -> dict[str, set[Layer]]:
    """Of layers whose weight transformers looks for where it is packed, see `looked_for`."""
    packed = PackQuantized | MXFP4Packed | MXFP6Packed | NVFP4Packed
    unread = looked_for(model, [name for name, layer in layers.items() if isinstance(kind_of(layer), packed)])
    text = f"from_pretrained of transformers fails at {_place(unread)}: its class looks for weights that {{}} packs; "
    return {f"{text}keep these layers, or give them FP8": {layers[name] for name in unread}}


def _place(names: Sequence[str]) -> str:
    """What matches modules, and as little else as their common beginning allows."""
    common = commonpath([name.replace(".", "/") for name in names]) if names else ""
    return f"{common.replace('/', '.')}.*" if len(names) > 1 else "".join(names)


def asymmetric(layer: Layer) -> bool:
    """Whether a matrix has integers with zero points."""
    return isinstance(layer.format, Int) and not layer.format.symmetric


def _w4a8(layer: Layer) -> bool:
    """Whether weights are 4-bit integers and inputs FP8, for which vLLM has a scheme on Hopper alone."""
    ints = as_int(layer.format) if isinstance(kind_of(layer), PackQuantized) else None
    return ints is not None and layer.activations is not None and alike(layer.activations, FP8_INPUTS)


def _w8a8_fp8(layer: Layer) -> bool:
    """Whether weights and inputs are FP8, whose products older GPUs do not have."""
    return isinstance(kind_of(layer), FloatQuantized | NaiveQuantized) and layer.activations is not None


def _vllm_runs(layer: Layer) -> bool:
    """Whether vLLM has a kernel; it has for integers of 2 to 8 bits, with zero points or without, in any groups."""
    ints = as_int(layer.format)
    return not _w4a8(layer) or (ints is not None and ints.group == GROUP)


def _vllm_runs_experts(layer: Layer) -> bool:
    """The same for experts, each of whose layouts has its own conditions there."""
    kind, inputs = kind_of(layer), layer.activations
    if isinstance(kind, PackQuantized):
        ints = as_int(layer.format)
        only = inputs is None and ints is not None and ints.bits in WIDTHS
        return only or (inputs is not None and alike(inputs, FP8_INPUTS) and _vllm_runs(layer))
    if isinstance(kind, IntQuantized):
        return layer.format.granularity == "channel" and inputs is not None and alike(inputs, INT8_INPUTS[0])
    if isinstance(kind, NaiveQuantized):
        return False
    if isinstance(kind, FloatQuantized):
        return inputs is None or (layer.format.granularity == "tensor") == inputs.static
    return True
