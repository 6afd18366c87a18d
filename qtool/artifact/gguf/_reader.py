"""Reads a GGUF file with its codes, where they are in a block type that qtool knows."""

from __future__ import annotations

from pathlib import Path

from qtool.artifact.gguf._writer import block_types
from qtool.checkpoint._base import Layer, QuantizedCheckpoint
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.checkpoint.raw_bytes import read_bytes
from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.residuals._base import Matrix


class QuantizedGGUF(GGUFCheckpoint, QuantizedCheckpoint):
    """A GGUF file, or the first of its parts. Matrices in other block types are plain tensors here, decoded when read.

    Raises:
        CheckpointError: damaged, incomplete, or not a model that qtool knows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        blocks = {cls.ggml_type: cls() for cls in block_types()}
        kinds = {name: self._file.find(*self._stored(name)).kind for name in self.names()}
        self._formats = {
            name.removesuffix(".weight"): blocks[kind]
            for name, kind in kinds.items()
            if kind in blocks and (blocks[kind].matrix_scale or self._scale(name) is None)
        }
        self.layers = {module: Layer(block) for module, block in self._formats.items()}

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        name = f"{module}.weight"
        stored, order = self._file.find(*self._stored(name)), self._order(name)
        packed = read_bytes(stored.path, stored.offset, stored.nbytes, name).view(stored.shape[0], -1)
        block = self._formats[module]
        codes, params = block.unpack(packed if order is None else packed[order.argsort()])
        scale = self._scale(name)
        if scale is not None and block.matrix_scale:
            params[block.matrix_scale] *= scale
        if not all(bool(part.isfinite().all()) for part in block.affine(params)):
            raise NumericsError(f"tensor {name} is not finite", found=f"NaN or infinite scales in {stored.path}")
        return Matrix(Quantized(codes, params, block))
