"""Reads folders in the layouts of compressed-tensors, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._floats import finite_e4m3
from qtool.artifact._packed import SCALE_DTYPES, Infos, PackedCheckpoint, Packing
from qtool.artifact.compressed_tensors import _cache, _inputs
from qtool.artifact.compressed_tensors._config import METHOD
from qtool.artifact.compressed_tensors._floats import FloatQuantized
from qtool.artifact.compressed_tensors._integers import with_gaps
from qtool.artifact.compressed_tensors._kinds import SCALE
from qtool.artifact.compressed_tensors._schemes import Scheme, Schemes
from qtool.artifact.compressed_tensors._transforms import Transforms
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.adapter import Adapter
from qtool.checkpoint.hf import digest
from qtool.checkpoint.parts import Parts
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError, NumericsError
from qtool.formats._base import Format, Quantized
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.low_rank import LowRank

INDEX, ZERO = "weight_g_idx", "weight_zero_point"
INPUT_SCALES = (_inputs.INPUT_SCALE, _inputs.INPUT_ZERO, _inputs.INPUT_GLOBAL)


class CompressedCheckpoint(PackedCheckpoint):
    """A model in compressed-tensors' layouts; see `PackedCheckpoint`."""

    mark: ClassVar[str] = SCALE
    layout: ClassVar[str] = METHOD

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        self._transforms.check(self)

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        if how.get("quant_method") != METHOD:
            what = f"{self.source} is no {METHOD} artifact"
            raise CheckpointError(what, wanted=f"quant_method {METHOD!r} in config.json")
        self._schemes = Schemes(how, str(Path(self.source) / "config.json"))
        self._transforms = Transforms(how, str(Path(self.source) / "config.json"))
        self._found: dict[str, Scheme] = {}
        for name in self._located:
            module, _, part = name.rpartition(".")
            if part == "weight_packed" and f"{module}.{SCALE}" not in self._located:
                raise CheckpointError(f"{self.source} lacks {module}.{SCALE}")

    def _weights(self, folder: Path) -> dict[str, SafetensorsFile]:
        """See `HFCheckpoint._weights`; scales of the KV cache are none."""
        self._adapter, self._branches = Adapter(folder), dict[str, LowRank]()
        plain = super()._weights(folder)
        self._adapter.check(self._branches)

        def take(name: str) -> Tensor | None:
            file = plain.pop(name, None)
            return file.read(name) if file else None

        self.cache = _cache.read(self, self._how, take)
        return plain

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        scheme = self._schemes.find(module, SCALE_DTYPES.get(found[SCALE].dtype, "bf16"))
        kind = scheme.kind
        layer = _inputs.decode(scheme.layer, found, partial(self._read, module), f"{self.source}: {module}")
        residuals = self._adapter.residuals(module, n, k)
        if residuals:
            self._branches[module] = residuals[0]
        layer = replace(layer, input_ops=self._transforms.ops(module, k), residuals=residuals)
        self._found[module] = scheme._replace(layer=layer)
        if reason := layer.format.misfit(k):
            raise CheckpointError(f"{self.source}: {module}: {reason}")
        model_dtype = found[SCALE].dtype if found[SCALE].dtype in SCALE_DTYPES else next(iter(SCALE_DTYPES))
        parts = kind.infos(layer.format, n, k, model_dtype)
        if parts[SCALE].shape == (1,) and found[SCALE].shape in ((), (1, 1)):  # one number has as many dimensions
            parts[SCALE] = TensorInfo(found[SCALE].shape, parts[SCALE].dtype)
        older = with_gaps(layer.format, n, k)
        if "weight_packed" in found and found["weight_packed"] == older.get("weight_packed"):
            parts |= {part: info for part, info in older.items() if part in parts}
        extra = {part: found[part] for part in INPUT_SCALES if part in found}
        if ZERO in found and ZERO not in parts:
            if bool(self._read(module, ZERO).any()):
                raise CheckpointError(f"{self.source}: {module}.{ZERO}", wanted="none, or zeros", found="others")
            extra[ZERO] = found[ZERO]  # old versions wrote them for symmetric codes as well
        if INDEX in found:
            extra[INDEX] = TensorInfo((k,), found[INDEX].dtype)
            if not self._in_order(module, k, layer.format):
                return Packing((n, k), None, parts | extra, "its groups are in activation order (weight_g_idx)")
        return Packing((n, k), layer, parts | extra, scheme.reason)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        found = super().rows(name, start, stop)
        for correction in self.corrections(name.removesuffix(".weight"), start, stop):
            found = correction.apply(found)
        return found

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        return Matrix(super().matrix(module).quantized, tuple(self.corrections(module)))

    def corrections(self, module: str, start: int = 0, stop: int | None = None) -> Sequence[Correction]:
        """See `QuantizedCheckpoint.corrections`; of rows `start` to `stop`."""
        residual = self._branches.get(module)
        return () if residual is None else (self._adapter.correction(module, residual, start, stop),)

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        stored = dict(sorted((self._located | self._adapter.located).items()))
        return digest(self.config | {"quantization_config": self._how}, self.files, stored)

    def as_stored(self, module: str) -> Parts | None:
        """See `HasParts.as_stored`: FP8, whose tensors are those of every writer."""
        scheme = self._found.get(module)
        alone = scheme is not None and isinstance(scheme.kind, FloatQuantized) and module not in self._branches
        return super().as_stored(module) if alone else None

    def _check_part(self, module: str, packing: Packing, part: str, data: Tensor) -> None:
        """See `PackedCheckpoint._check_part`."""
        if not finite_e4m3(data, packing.parts[part].dtype):
            raise NumericsError(f"tensor {module}.weight is not finite", found=f"NaN or infinity in {self.source}")

    def _in_order(self, module: str, k: int, fmt: Format) -> bool:
        """Whether groups consist of neighbours; -1 stands for a group that nobody chose."""
        index, width = self._read(module, INDEX).long(), fmt.group_columns or k
        if bool((index == -1).all()) or torch.equal(index, torch.arange(k) // width):
            return True
        if not torch.equal(index.sort().values, torch.arange(k) // width):
            wanted = f"{width} columns in each of {k // width} groups"
            raise CheckpointError(f"{self.source}: {module}.{INDEX}", wanted=wanted, found="others")
        return False

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized | Tensor:
        """See `PackedCheckpoint._unpack`."""
        (n, k), (kind, layer, _) = packing.shape, self._found[module]
        if "weight_shape" in packing.parts and (found := self._read(module, "weight_shape").tolist()) != [n, k]:
            raise CheckpointError(f"{self.source}: {module}.weight_shape", wanted=[n, k], found=found)
        try:
            quantized = kind.decode(layer.format, k, partial(self._read, module), start, stop)
        except NumericsError as error:
            raise NumericsError(f"{self.source}: {module}.{error}") from error
        if packing.layer:
            return quantized
        order = self._read(module, INDEX).long().argsort(stable=True)
        together = replace(quantized, codes=quantized.codes[:, order])
        return self._checked(module, together).decode()[:, order.argsort()]
