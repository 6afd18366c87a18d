"""Reads ModelOpt checkpoints, whoever wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.artifact._packed import Infos, PackedCheckpoint, Packing
from qtool.artifact._settings import Settings, quantization_config, read_settings
from qtool.artifact.modelopt._algos import ALGOS, SCALE, Algo, fp8
from qtool.checkpoint._base import Cache, Checkpoint, Static, TensorInfo
from qtool.checkpoint.config import read_json
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized
from qtool.recipe.cache import KVCache

CONFIG = "hf_quant_config.json"


def cache_names(model: Checkpoint) -> list[tuple[str, str]]:
    """Names of the two scales of each block's KV cache."""
    found = []
    for block in range(model.family.blocks(model.config)):
        prefix = model.family.block_prefix.format(i=block)
        paths = {linear.role: linear.path for linear in model.family.block_linears(model.config, block)}
        found.append((f"{prefix}{paths['k']}.k_scale", f"{prefix}{paths['v']}.v_scale"))
    return found


def read_quantization(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization by ModelOpt; empty if it is by another tool, or if there is none."""
    how = quantization_config(folder) or {}
    if how and how.get("quant_method") != "modelopt":
        return {}
    try:
        other = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    except CheckpointError:
        other = {}
    nested = other.get("quantization") or how.get("quantization") or how
    return nested if isinstance(nested, dict) else {}


class _AlgoKeys(Settings):
    """How a matrix is quantized."""

    quant_algo: str
    group_size: int | None = Field(None, gt=0)
    kv_cache_quant_algo: Literal["FP8"] | None = None


class ModelOptCheckpoint(PackedCheckpoint):
    """A ModelOpt checkpoint; see `PackedCheckpoint`."""

    mark: ClassVar[str] = SCALE

    def _settings(self, folder: Path) -> dict[str, Any]:
        """See `PackedCheckpoint._settings`."""
        return read_quantization(folder)

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        self._usual = read_settings(_AlgoKeys, how, self.source)
        layers = how.get("quantized_layers") or {}
        if not isinstance(layers, dict) or not all(isinstance(keys, dict) for keys in layers.values()):
            raise CheckpointError(f"{self.source}: quantized_layers", wanted="objects by module", found="others")
        self._named = {
            name: read_settings(_AlgoKeys, keys, f"{self.source}: {name[:60]}") for name, keys in layers.items()
        }
        self._algos: dict[str, Algo] = {}

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        keys = self._named.get(module, self._usual)
        where = f"{self.source}: {module}"
        if keys.quant_algo not in ALGOS:
            raise CheckpointError(f"{where}: quant_algo", wanted=", ".join(ALGOS), found=repr(keys.quant_algo)[:60])
        algo = self._algos[module] = ALGOS[keys.quant_algo]
        layer = algo.layer(keys.model_dump(exclude_none=True), found)
        if (reason := layer.format.misfit(k)) or n % 2:
            raise CheckpointError(f"{where}: {reason or f'{n} rows are no pairs'}")
        parts = algo.infos(layer, n, k)
        for part in (SCALE, f"{SCALE}_2"):  # one number is stored with one dimension or with none
            if part in parts and parts[part].shape == () and part in found and found[part].shape == (1,):
                parts[part] = TensorInfo((1,), parts[part].dtype)
        extra = {part: found[part] for part in ("input_scale", "pre_quant_scale") if part in found}
        if "pre_quant_scale" in extra and extra["pre_quant_scale"].shape != (k,):
            raise CheckpointError(f"{where}.pre_quant_scale", wanted=[k], found=list(extra["pre_quant_scale"].shape))
        if "pre_quant_scale" in extra and not bool((self._read(module, "pre_quant_scale") == 1).all()):
            return Packing((n, k), None, parts | extra, "its inputs are scaled first (pre_quant_scale)")
        if "input_scale" not in extra:
            return Packing((n, k), layer, parts | extra)
        if layer.activations and layer.activations.static:
            layer = replace(layer, static=self._static(f"{module}.input_scale", self._read(module, "input_scale")))
            return Packing((n, k), layer, parts | extra)
        return Packing((n, k), layer, parts | extra, "its inputs have calibrated scales")

    def _weights(self, folder: Path) -> dict[str, SafetensorsFile]:
        """See `HFCheckpoint._weights`. A scale of the KV cache that is not there is 1, as runtimes have it."""
        plain = super()._weights(folder)
        if self._usual.kv_cache_quant_algo:
            statics = {}
            for block, names in enumerate(cache_names(self)):
                files = [(name, plain.pop(name, None)) for name in names]
                keys, values = (self._static(n, f.read(n)) if f else Static(1.0) for n, f in files)
                statics[block] = (keys,), (values,)
            self.cache = Cache(KVCache(keys=fp8("tensor"), values=fp8("tensor")), statics)
        return plain

    def _static(self, name: str, tensor: Tensor) -> Static:
        """A scale that calibration found. Raises CheckpointError: it is none."""
        scale = float(tensor) if tensor.numel() == 1 and tensor.dtype == torch.float32 else math.nan
        if not 0 < scale < math.inf:
            raise CheckpointError(f"{self.source}: {name}", wanted="a positive float32", found=f"{tensor!r:.60}")
        return Static(scale)

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized | Tensor:
        """See `PackedCheckpoint._unpack`."""
        keys, algo = self._named.get(module, self._usual), self._algos[module]
        layer = packing.layer or algo.layer(keys.model_dump(exclude_none=True), packing.parts)
        found = algo.decode(layer, packing.shape[1], partial(self._read, module), start, stop)
        if packing.layer is None:
            return self._checked(module, found).decode() * self._read(module, "pre_quant_scale").to(torch.float32)
        return found
