"""What a ModelOpt checkpoint says and holds, made from a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.artifact._integers import as_integers, half_dtype, integers
from qtool.artifact._packed import SCALE_DTYPES, Infos
from qtool.artifact._targets import kept_linears
from qtool.artifact.modelopt._algos import ALGOS, Algo, algo_of
from qtool.artifact.modelopt._groups import CACHE, config_groups
from qtool.artifact.modelopt._reader import cache_names
from qtool.checkpoint._base import Checkpoint, Layer, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.modules import modules
from qtool.errors import PlanError
from qtool.formats._base import Quantized

VERSION = "0.47.0"
"""Of the tool whose layout this is; runtimes know the layout by the name of that tool."""


def settings(model: QuantizedCheckpoint) -> dict[str, Any]:
    """hf_quant_config.json."""
    layers = {module: {"quant_algo": _algo(x).name, **_algo(x).keys(x)} for module, x in model.layers.items()}
    first = next(iter(layers.values()))
    alike = all(keys == first for keys in layers.values())
    how = {
        **(first if alike else {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}),
        "exclude_modules": [
            *kept_linears(model),
            *([] if model.family.embedding in layers else [model.family.embedding]),
        ],
        "kv_cache_quant_algo": "FP8" if model.cache else None,
    }
    return {"producer": {"name": "modelopt", "version": VERSION}, "quantization": how}


def cache_scales(model: Checkpoint) -> dict[str, Tensor]:
    """Scales of the KV cache by name."""
    if not isinstance(model, QuantizedCheckpoint) or model.cache is None:
        return {}
    names = cache_names(model)
    return {
        name: torch.tensor(static.scale)
        for block, statics in model.cache.statics.items()
        for name, (static,) in zip(names[block], statics, strict=True)
    }


def flat(how: Mapping[str, Any]) -> dict[str, Any]:
    """The same for config.json, in both spellings: as it was there first, and as ModelOpt writes it now."""
    found = {**how["quantization"], "producer": how["producer"], "quant_method": "modelopt"}
    cache = {"kv_cache_scheme": CACHE} if found["kv_cache_quant_algo"] else {}
    return found | cache | {"ignore": found["exclude_modules"], "config_groups": config_groups(found)}


class ModelOptTensors:
    """Makes the tensors of a model.

    Args:
        model: whose modules are known.
        layers: of which these are quantized, all as ModelOpt knows it.
    """

    def __init__(self, model: Checkpoint, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.dtype = half_dtype(model)
        self.merged = {m.name: m.fused for m in modules(model)}
        self.largest: dict[str, float] = {}

    def infos(self, module: str, layer: Layer, n: int, k: int) -> Infos:
        """Names below the module, shapes and types. Scales of integers have the model's type."""
        static = layer.static
        if ints := integers(layer.format):
            layer = Layer(ints.model_copy(update={"scale_dtype": SCALE_DTYPES[self.dtype]}), layer.activations)
        parts = _algo(layer).infos(layer, n, k)
        if static:
            parts["input_scale"] = TensorInfo((), torch.float32)
        if self._scales_inputs(module):
            parts["pre_quant_scale"] = TensorInfo((k,), self.dtype)
        return parts

    def encode(self, module: str, quantized: Quantized) -> dict[str, Tensor]:
        """The tensors of a matrix. Raises PlanError: its scales are not exact, or not those that runtimes can merge."""
        if integers(quantized.format):
            quantized = as_integers(quantized, module, self.dtype)
        layer = self.layers[module]
        one = quantized.params.get("tensor", quantized.params.get("scale")) if quantized.format.needs_largest else None
        if one is not None:
            whole = float(one[0, 0])
            if self.largest.setdefault(self.merged[module] or module, whole) != whole:
                line = f"{module}: runtimes merge it with matrices that have another scale of the whole matrix"
                raise PlanError([line], "ModelOpt has one such scale for merged matrices")
        tensors = _algo(layer).encode(quantized)
        if layer.static:
            tensors["input_scale"] = _float32(layer.static.scale, module)
        if self._scales_inputs(module):
            tensors["pre_quant_scale"] = torch.ones(quantized.codes.shape[1], dtype=self.dtype)
        return tensors

    def _scales_inputs(self, module: str) -> bool:
        """Runtimes want factors of inputs where they merge nothing; for what they merge, the norm before has them."""
        return _algo(self.layers[module]) is ALGOS["W4A16_AWQ"] and self.merged[module] is None


def _algo(layer: Layer) -> Algo:
    algo = algo_of(layer)
    assert algo is not None  # the plan has asked
    return algo


def _float32(scale: float, module: str) -> Tensor:
    """The scale of a module's inputs. Raises PlanError: it is not exact."""
    found = torch.tensor(scale)
    if float(found) != scale:
        line = f"{module}: the scale of its inputs is the inverse of a number that fp32 holds; use plain nvfp4"
        raise PlanError([line], "ModelOpt stores that scale itself, in fp32")
    return found
