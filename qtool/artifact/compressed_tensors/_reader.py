"""Reads folders in compressed-tensors' integer layouts, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtool.artifact._manifest import checked
from qtool.artifact.compressed_tensors._config import METHOD, Schemes
from qtool.artifact.compressed_tensors._layout import PACKED, decode, infos
from qtool.checkpoint._base import Layer, QuantizedCheckpoint, TensorInfo, verify
from qtool.checkpoint.config import read_config
from qtool.checkpoint.hf import SIDE_FILES, digest, locate
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized
from qtool.formats.int import DTYPES, Int

SCALE_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


class CompressedCheckpoint(QuantizedCheckpoint):
    """A model in `pack-quantized` or `int-quantized` layout. Opening reads headers only.

    Args:
        folder: where it is.

    Raises:
        CheckpointError: something is missing, damaged, or of a layout that qtool does not read.
    """

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self.config, self.family = read_config(folder / "config.json")
        how = self.config.pop("quantization_config", {"quant_method": METHOD})
        if not isinstance(how, dict) or how.get("quant_method") != METHOD:
            raise CheckpointError(f"{folder} is no {METHOD} artifact", wanted=f"quant_method {METHOD!r} in config.json")
        schemes = Schemes(how, str(folder / "config.json"))
        self.files = {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}
        self._stored = locate(folder)
        shapes = self.family.shapes(self.config)
        self._kinds: dict[str, str] = {}
        self.layers: dict[str, Layer] = {}
        found = (self._quantized_module(name) for name in self._stored)
        modules = {module for module in found if module is not None}
        for name in shapes:
            if (module := name.removesuffix(".weight")) in modules:
                self._kinds[module], layer = schemes.layer(module)
                self.layers[module] = self._with_scale_dtype(module, layer)
        parts = {f"{module}.{part}" for module in modules for part in self._parts(module)}
        held = self._stored.keys() - parts | {f"{module}.weight" for module in modules}
        self._names = [name for name in shapes if name in held] + sorted(held - shapes.keys())
        verify(self)

    def _quantized_module(self, name: str) -> str | None:
        """The module that a stored tensor holds the codes of; None if it holds none."""
        module, _, part = name.rpartition(".")
        if part == "weight_g_idx":
            raise CheckpointError(f"{self.source}: {name}: groups in activation order are not supported")
        plain = part == "weight" and self._stored[name].info(name).dtype == torch.int8
        return module if part == "weight_packed" or plain else None

    def _parts(self, module: str) -> list[str]:
        layer = self.layers.get(module)
        if layer is None:
            raise CheckpointError(f"{self.source}: {module} is quantized, but the model has no such module")
        return list(self._infos(module, layer))

    def _infos(self, module: str, layer: Layer) -> dict[str, TensorInfo]:
        n, k = self.family.shapes(self.config)[f"{module}.weight"]
        assert isinstance(layer.format, Int)
        return infos(self._kinds[module], layer.format, n, k, DTYPES[layer.format.scale_dtype])

    def _with_scale_dtype(self, module: str, layer: Layer) -> Layer:
        """The layer with the type that its scales are stored in, after a look at every header entry of it."""
        name = f"{module}.weight_scale"
        if name not in self._stored:
            raise CheckpointError(f"{self.source} lacks {name}")
        dtype = self._stored[name].info(name).dtype
        if dtype not in SCALE_DTYPES:
            raise CheckpointError(f"{self.source}: {name}", wanted=", ".join(SCALE_DTYPES.values()), found=dtype)
        exact = Layer(layer.format.model_copy(update={"scale_dtype": SCALE_DTYPES[dtype]}), layer.activations)
        for part, wanted in self._infos(module, exact).items():
            file = self._file(f"{module}.{part}")
            if (found := file.info(f"{module}.{part}")) != wanted:
                hint = "compressed-tensors before 0.18 packed odd widths with gaps" if part == "weight_packed" else None
                raise CheckpointError(f"{file.path}: {module}.{part}", wanted=wanted, found=found, hint=hint)
        return exact

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        if name.removesuffix(".weight") in self.layers:
            return TensorInfo(self.family.shapes(self.config)[name], torch.float32)
        return self._file(name).info(name)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        module = name.removesuffix(".weight")
        return self.quantized(module).decode() if module in self.layers else self._file(name).read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        if name.removesuffix(".weight") in self.layers:
            return super().rows(name, start, stop)
        return self._file(name).read(name, start, stop)

    def quantized(self, module: str) -> Quantized:
        """See `QuantizedCheckpoint.quantized`."""
        layer, kind = self.layers[module], self._kinds[module]
        n, k = self.family.shapes(self.config)[f"{module}.weight"]
        names = {part: f"{module}.{part}" for part in self._infos(module, layer)}
        stored = {part: self._file(name).read(name) for part, name in names.items()}
        file = self._file(names["weight_scale"])
        if kind == PACKED and stored["weight_shape"].tolist() != [n, k]:
            raise CheckpointError(
                f"{file.path}: {module}.weight_shape", wanted=[n, k], found=stored["weight_shape"].tolist()
            )
        assert isinstance(layer.format, Int)
        return checked(decode(kind, stored, layer.format, n, k), module, file.path)

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return digest(self.config, self.files, self._stored)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} holds no tensor {name!r}")
        return self._stored[name]
