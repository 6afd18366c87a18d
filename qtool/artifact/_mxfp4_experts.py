"""gpt-oss as OpenAI published it: all experts of a block in two tensors of MXFP4 blocks, everything else as it is.

    experts.gate_up_proj_blocks   uint8 [E, 2 F, K / 32, 16]    two columns in a byte, the even one low
    experts.gate_up_proj_scales   uint8 [E, 2 F, K / 32]        exponents, 127 for 1

and `down_proj` alike; rows of gate and up take turns. Read only: nobody trains in that layout.
Source: https://huggingface.co/docs/transformers/model_doc/gpt_oss
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.artifact._floats import from_bits
from qtool.artifact._packed import Infos, PackedCheckpoint, Packing
from qtool.artifact._settings import quantization_config
from qtool.checkpoint._base import Layer, TensorInfo
from qtool.checkpoint.families._parts import Slice
from qtool.checkpoint.hf import locate
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized
from qtool.formats.mxfp4 import MXFP4
from qtool.numerics.grids.bits import unpack

COLUMNS = 32


class MXFP4Experts(PackedCheckpoint):
    """Such a checkpoint; see `PackedCheckpoint`."""

    mark = "weight_blocks"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """True if `path` looks like this layout."""
        return (quantization_config(path) or {}).get("quant_method") == "mxfp4"

    def _weights(self, folder: Path) -> dict[str, SafetensorsFile]:
        """See `HFCheckpoint._weights`."""
        self._located = locate(folder)
        self._how = self._settings(folder)
        del self.config["quantization_config"]
        plain = dict(self._located)
        wholes = [name.removesuffix("_blocks") for name in plain if name.endswith("_blocks")]
        slices = self.family.slices(self.config, wholes)
        shapes = self.family.shapes(self.config)
        self._places: dict[str, Slice] = {}
        self._packings: dict[str, Packing] = {}
        for name, place in slices.items():
            module, (n, k) = name.removesuffix(".weight"), shapes[name]
            if k % COLUMNS:
                raise CheckpointError(f"{self.source}: {module}: rows of {k} columns are no blocks of {COLUMNS}")
            self._places[module] = place
            self._packings[module] = self._packing(module, n, k, {})
            self.layers[module] = Layer(MXFP4())
            plain[name] = self._located[f"{place.tensor}_blocks"]
        for whole in wholes:
            self._check(whole, [place for place in slices.values() if place.tensor == whole], plain)
        return plain

    def _check(self, whole: str, places: list[Slice], plain: dict[str, SafetensorsFile]) -> None:
        """Compares headers with what config.json implies, and takes them out of the plain tensors."""
        if not places:
            raise CheckpointError(f"{self.source}: {whole}_blocks is packed, but the model has no such experts")
        experts, columns, rows = places[0].shape  # as trained, which is transposed
        shape = (experts, rows, columns // COLUMNS)
        for part, wanted in (("blocks", (*shape, COLUMNS // 2)), ("scales", shape)):
            file = plain.pop(f"{whole}_{part}", None)
            found = file.info(f"{whole}_{part}") if file else None
            if found != TensorInfo(wanted, torch.uint8):
                what = f"{self.source}: {whole}_{part}"
                raise CheckpointError(what, wanted=f"uint8 {list(wanted)}", found=found or "nothing")

    def _understand(self, how: Mapping[str, Any]) -> None:
        """Nothing more is said."""

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        return Packing((n, k), Layer(MXFP4()), {})

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized:
        """See `PackedCheckpoint._unpack`."""
        blocks, exponent = (self._rows(module, part, start, stop) for part in ("blocks", "scales"))
        fmt = MXFP4()
        codes = from_bits(unpack(blocks.flatten(1), fmt.code_bits, packing.shape[1]), fmt)
        return Quantized(codes, {"exponent": exponent}, fmt)

    def _rows(self, module: str, part: str, start: int, stop: int) -> Tensor:
        """Some rows of an expert's matrix."""
        place = self._places[module]
        name = f"{place.tensor}_{part}"
        rows = range(place.first + place.step * start, place.first + place.step * stop, place.step)
        first, last = (rows[0], rows[-1] + 1) if rows else (0, 0)
        return self._located[name].read(name, first, last, place.index)[:: place.step].contiguous()
