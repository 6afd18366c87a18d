"""Reads folders in the layouts of compressed-tensors, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from qtool.artifact._packed import SCALE_DTYPES, Infos, PackedCheckpoint, Packing
from qtool.artifact.compressed_tensors._config import METHOD
from qtool.artifact.compressed_tensors._kinds import SCALE
from qtool.artifact.compressed_tensors._schemes import Scheme, Schemes
from qtool.checkpoint._base import TensorInfo
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized

INPUT_SCALES = ("input_scale", "input_zero_point", "input_global_scale")


class CompressedCheckpoint(PackedCheckpoint):
    """A model in compressed-tensors' layouts; see `PackedCheckpoint`."""

    mark: ClassVar[str] = SCALE

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        if how and how.get("quant_method") != METHOD:
            what = f"{self.source} is no {METHOD} artifact"
            raise CheckpointError(what, wanted=f"quant_method {METHOD!r} in config.json")
        self._schemes = Schemes(how, str(Path(self.source) / "config.json"))
        self._found: dict[str, Scheme] = {}
        for name in self._located:
            module, _, part = name.rpartition(".")
            if part == "weight_g_idx":
                raise CheckpointError(f"{self.source}: {name}: groups in activation order are not supported")
            if part == "weight_packed" and f"{module}.{SCALE}" not in self._located:
                raise CheckpointError(f"{self.source} lacks {module}.{SCALE}")

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        scheme = self._schemes.find(module, SCALE_DTYPES.get(found[SCALE].dtype, "bf16"))
        kind, layer = scheme.kind, scheme.layer
        self._found[module] = scheme
        if reason := layer.format.misfit(k):
            raise CheckpointError(f"{self.source}: {module}: {reason}")
        model_dtype = found[SCALE].dtype if found[SCALE].dtype in SCALE_DTYPES else next(iter(SCALE_DTYPES))
        parts = kind.infos(layer.format, n, k, model_dtype)
        if parts[SCALE].shape == (1,) and found[SCALE].shape in ((), (1, 1)):  # one number has as many dimensions
            parts[SCALE] = TensorInfo(found[SCALE].shape, parts[SCALE].dtype)
        words, wanted = found.get("weight_packed"), parts.get("weight_packed")
        if words and wanted and words != wanted:
            hint = "compressed-tensors before 0.18 packed odd widths with gaps"
            raise CheckpointError(f"{self.source}: {module}.weight_packed", wanted=wanted, found=words, hint=hint)
        extra = {part: found[part] for part in INPUT_SCALES if part in found}
        return Packing((n, k), layer, parts | extra, scheme.reason)

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized:
        """See `PackedCheckpoint._unpack`."""
        assert packing.layer is not None
        (n, k), fmt = packing.shape, packing.layer.format
        if "weight_shape" in packing.parts and (found := self._read(module, "weight_shape").tolist()) != [n, k]:
            raise CheckpointError(f"{self.source}: {module}.weight_shape", wanted=[n, k], found=found)
        return self._found[module].kind.decode(fmt, k, partial(self._read, module), start, stop)
