"""Folders whose matrices are packed into several tensors each, as quantization tools save them for transformers.

What such layouts have in common is here: which tensors belong to a matrix, that their headers are what config.json
implies, that a packed matrix reads like any other weight, and that the writer streams. A layout says what its tensors
are and how codes become words.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._settings import SETTINGS, quantization_config
from qtool.checkpoint._base import Layer, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.hf import WHOLE, HFCheckpoint, digest, locate
from qtool.checkpoint.parts import Parts
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.checkpoint.shapes import stored_shapes
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized
from qtool.formats.int import DTYPES
from qtool.residuals._base import Matrix
from qtool.store.manifest import checked

SCALE_DTYPES = {dtype: name for name, dtype in DTYPES.items()}

Infos = dict[str, TensorInfo]
"""Tensors of one matrix, by their names below the module."""


@dataclass(frozen=True)
class Packing:
    """How one matrix is stored.

    Attributes:
        shape: (N, K).
        layer: its formats; None if no format of qtool has its groups, so that it is decoded when it is read.
        parts: the tensors that it is packed into.
        reason: why `layer` is None, or why no other layout can have all of it.
    """

    shape: tuple[int, int]
    layer: Layer | None
    parts: Infos
    reason: str = ""


class PackedCheckpoint(HFCheckpoint, QuantizedCheckpoint):
    """A model some of whose matrices are packed.

    Args:
        folder: where it is.
        source: what the user called it, if not that.

    Attributes:
        mark: the tensor below a module that says that it is packed.
        keys: of config.json, that say how the model is quantized; the first one is read.
        layout: what others call the tensors of matrices where these may be taken over as they are; empty: nothing.

    Raises:
        CheckpointError: something is missing, damaged, or of a layout that qtool does not read.
    """

    mark: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = (SETTINGS,)
    layout: ClassVar[str] = ""

    def __init__(self, folder: Path, source: str | None = None) -> None:
        self.layers: dict[str, Layer] = {}
        told = WHOLE.set(True)  # its tensors are those of all parts
        try:
            super().__init__(folder, source)
        finally:
            WHOLE.reset(told)

    def _locate(self, folder: Path) -> dict[str, SafetensorsFile]:
        """Tensor name -> file."""
        return locate(folder)

    def _settings(self, folder: Path) -> dict[str, Any]:
        """What the folder says about its quantization."""
        return quantization_config(folder, self.keys[0]) or {}

    @abstractmethod
    def _understand(self, how: Mapping[str, Any]) -> None:
        """Reads what config.json says about the quantization. Raises CheckpointError: not what qtool can read."""

    @abstractmethod
    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """How a matrix of n rows and k columns is stored that has the tensors `found`."""

    @abstractmethod
    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized | Tensor:
        """Rows `start` to `stop`; a float32 tensor where the packing has no layer."""

    def _weights(self, folder: Path) -> dict[str, SafetensorsFile]:
        """See `HFCheckpoint._weights`."""
        self._located = self._locate(folder)
        self._how = self._settings(folder)
        self.config = {key: value for key, value in self.config.items() if key not in self.keys}
        self._understand(self._how)
        found: dict[str, Infos] = defaultdict(dict)
        for name, file in self._located.items():
            module, _, part = name.rpartition(".")
            found[module][part] = file.info(name)
        plain = dict(self._located)
        self._packings: dict[str, Packing] = {}
        for name, shape in self._packed_shapes().items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and self.mark in found[module]:
                packing = self._packings[module] = self._packing(module, *shape, found[module])
                plain[name] = self._take(module, packing, plain)
                self._drop_idle_bias(module, plain)
                if packing.layer:
                    self.layers[module] = packing.layer
        if strange := [name for name in plain if name.endswith(f".{self.mark}")]:
            raise CheckpointError(f"{self.source}: {strange[0]} is packed, but the model has no such module")
        return plain

    def _packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what may be packed, by name: of the model's matrices, and of those beside it."""
        shapes = self.family.shapes(self.config)
        if not self.family.derived or self.family.model_free:
            return shapes
        return shapes | {name: shape for name, shape in stored_shapes(self._located).items() if name not in shapes}

    def _take(self, module: str, packing: Packing, plain: dict[str, SafetensorsFile]) -> SafetensorsFile:
        """Checks a matrix's tensors, and takes them out of the plain ones."""
        for part, wanted in packing.parts.items():
            name = f"{module}.{part}"
            if name not in plain:
                raise CheckpointError(f"{self.source} lacks {name}", wanted=wanted)
            if (found := plain[name].info(name)) != wanted:
                raise CheckpointError(f"{plain[name].path}: {name}", wanted=wanted, found=found)
        files = [plain.pop(f"{module}.{part}") for part in packing.parts]
        return files[0]

    def _drop_idle_bias(self, module: str, plain: dict[str, SafetensorsFile]) -> None:
        """Old tools gave every layer a bias of zeros, whether the model has one or not."""
        name = f"{module}.bias"
        if name in plain and name not in self.family.shapes(self.config) and not plain[name].read(name).any():
            del plain[name]

    @property
    def decoded(self) -> dict[str, str]:
        """See `QuantizedCheckpoint.decoded`."""
        return {module: packing.reason for module, packing in self._packings.items() if packing.reason}

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        packing = self._packings.get(name.removesuffix(".weight"))
        return super().info(name) if packing is None else TensorInfo(packing.shape, torch.float32)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        packing = self._packings.get(name.removesuffix(".weight"))
        return super().tensor(name) if packing is None else self.rows(name, 0, packing.shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        module = name.removesuffix(".weight")
        if module not in self._packings:
            return super().rows(name, start, stop)
        found = self._unpack(module, self._packings[module], start, stop)
        return self._checked(module, found).decode() if isinstance(found, Quantized) else found

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        packing = self._packings[module]
        found = self._unpack(module, packing, 0, packing.shape[0])
        assert isinstance(found, Quantized)
        return Matrix(self._checked(module, found))

    def as_stored(self, module: str) -> Parts | None:
        """See `HasParts.as_stored`."""
        packing = self._packings.get(module)
        if not self.layout or packing is None or packing.layer is None or packing.reason or packing.layer.static:
            return None
        names = {part: f"{module}.{part}" for part in packing.parts}
        places = {part: self._located[name].stretch(name) for part, name in names.items()}
        return Parts(self.layout, packing.parts, places, partial(self._check_part, module, packing))

    def _check_part(self, module: str, packing: Packing, part: str, data: Tensor) -> None:
        """Raises NumericsError: bytes of a matrix's tensor make no finite weights. Only where there is a `layout`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return digest(self.config | {"quantization_config": self._how}, self.files, dict(sorted(self._located.items())))

    def _read(self, module: str, part: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor of a packed matrix, or its rows."""
        return self._located[f"{module}.{part}"].read(f"{module}.{part}", start, stop)

    def _checked(self, module: str, quantized: Quantized) -> Quantized:
        return checked(quantized, module, Path(self.source))

    def _scale_dtype(self, module: str, part: str, found: Infos) -> str:
        """The type of stored scales, as formats spell it."""
        if part not in found:
            raise CheckpointError(f"{self.source} lacks {module}.{part}")
        dtype = found[part].dtype
        if dtype not in SCALE_DTYPES:
            wanted = ", ".join(SCALE_DTYPES.values())
            raise CheckpointError(f"{self.source}: {module}.{part}", wanted=wanted, found=dtype)
        return SCALE_DTYPES[dtype]
