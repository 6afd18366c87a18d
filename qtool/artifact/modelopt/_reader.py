"""Reads ModelOpt checkpoints, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qtool.artifact._packed import Infos, PackedCheckpoint, Packing, Settings, quantization_config, read_settings
from qtool.artifact.modelopt._algos import ALGOS, SCALE, Algo
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.config import read_json
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized

CONFIG = "hf_quant_config.json"
CACHE = ("k_scale", "v_scale")


def told(folder: Path) -> dict[str, Any]:
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


class _Keys(Settings):
    """How a matrix is quantized."""

    quant_algo: str
    group_size: int | None = Field(None, gt=0)


class ModelOptCheckpoint(PackedCheckpoint):
    """A ModelOpt checkpoint; see `PackedCheckpoint`."""

    mark: ClassVar[str] = SCALE

    def _settings(self, folder: Path) -> dict[str, Any]:
        """See `PackedCheckpoint._settings`."""
        return told(folder)

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        self._usual = read_settings(_Keys, how, self.source)
        layers = how.get("quantized_layers") or {}
        if not isinstance(layers, dict) or not all(isinstance(keys, dict) for keys in layers.values()):
            raise CheckpointError(f"{self.source}: quantized_layers", wanted="objects by module", found="others")
        self._named = {name: read_settings(_Keys, keys, f"{self.source}: {name[:60]}") for name, keys in layers.items()}
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
        extra = {part: found[part] for part in ("input_scale", "pre_quant_scale", *CACHE) if part in found}
        if "pre_quant_scale" in extra and extra["pre_quant_scale"].shape != (k,):
            raise CheckpointError(f"{where}.pre_quant_scale", wanted=[k], found=list(extra["pre_quant_scale"].shape))
        if "pre_quant_scale" in extra and not bool((self._read(module, "pre_quant_scale") == 1).all()):
            return Packing((n, k), None, parts | extra, "its inputs are scaled first (pre_quant_scale)")
        reason = "its inputs have calibrated scales" if "input_scale" in extra else ""
        reason = "its layer has scales for the KV cache" if extra.keys() & set(CACHE) else reason
        return Packing((n, k), layer, parts | extra, reason)

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized | Tensor:
        """See `PackedCheckpoint._unpack`."""
        keys, algo = self._named.get(module, self._usual), self._algos[module]
        layer = packing.layer or algo.layer(keys.model_dump(exclude_none=True), packing.parts)
        found = algo.decode(layer, packing.shape[1], partial(self._read, module), start, stop)
        if packing.layer is None:
            return self._checked(module, found).decode() * self._read(module, "pre_quant_scale").to(torch.float32)
        return found
