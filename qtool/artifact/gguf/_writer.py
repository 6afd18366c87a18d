"""Writes a model as one GGUF file: names, row order, types and metadata as llama.cpp expects them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qtool import registry
from qtool.artifact.gguf._container import Container, Value
from qtool.artifact.gguf._tokenizer import tokenizer_metadata
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.errors import PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats._ggml import BlockFormat

PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""GGUF's numbers of the types that are not quantized."""
FILE_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 8: 7, 6: 8, 7: 9, 30: 32}
"""Number of a tensor type -> of a file that is mostly of that type (`llama_ftype` in llama.h)."""
PART = 1 << 22
"""Weights that are packed and written at once."""


def block_types() -> list[type[BlockFormat]]:
    """All block types that qtool knows, smallest first."""
    known = [registry.load("formats", name) for name in registry.names("formats")]
    blocks = [fmt for fmt in known if issubclass(fmt, BlockFormat)]
    return sorted(blocks, key=lambda block: block.block_bytes / block.columns)


def candidates(fmt: Format) -> list[BlockFormat]:
    """Block types that may hold matrices in a format, smallest first."""
    if isinstance(fmt, BlockFormat):
        return [fmt]
    return [block for block in (cls() for cls in block_types()) if block.may_hold(fmt) is None]


def held(quantized: Quantized, module: str) -> Quantized:
    """The same values in the smallest block type that holds them exactly.

    Raises:
        PlanError: none does.
    """
    reasons = []
    for block in candidates(quantized.format):
        result = block.hold(quantized)
        if isinstance(result, Quantized):
            return result
        reasons.append(f"{block.label}: {result}")
    raise PlanError([f"{module}: " + "; ".join(reasons)], f"GGUF cannot hold {quantized.format.label} exactly")


class Writer:
    """Writes one file.

    Args:
        model: what to write.
        path: where.
        name: the model's.
        pre_tokenizer: GGUF's name of the pre-tokenizer, where it is not recognized.
    """

    def __init__(self, model: QuantizedCheckpoint, path: Path, name: str, pre_tokenizer: str | None) -> None:
        self.model, self.path = model, path
        self.family, self.config = model.family, model.config
        self.names = self.family.gguf_names(self.config)
        self.extra = self.family.gguf_extra_tensors(self.config)
        weights = sum(math.prod(model.info(tensor).shape) for tensor in model.names())
        self.metadata: dict[str, Value] = {
            "general.architecture": self.family.gguf_arch,
            "general.type": "model",
            "general.name": name,
            "general.size_label": size_label(weights),
            "general.file_type": 0,
            "general.quantization_version": 2,
            **self.family.gguf_metadata(self.config),
            **tokenizer_metadata(model.files, self.config, pre_tokenizer),
        }

    def write(self) -> None:
        """Writes tensor by tensor.

        Raises:
            PlanError: the values of a layer do not fit any block type exactly.
            OSError: the disk is full or not writable.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.extra.items()}
        shapes |= {self.names[name]: self.model.info(name).shape for name in self.model.names()}
        sizes: Counter[int] = Counter()
        with Container(self.path, self.metadata, shapes) as file:
            for name, tensor in self.extra.items():
                file.add(name, PLAIN[tensor.dtype], [tensor])
            for name in self.model.names():
                module, _, kind = name.rpartition(".")
                if kind == "weight" and module in self.model.layers:
                    ggml_type, parts = self._quantized(module)
                else:
                    ggml_type, parts = self._kept(name, module)
                file.add(self.names[name], ggml_type, parts)
                sizes[ggml_type] += math.prod(self.model.info(name).shape)
            self.metadata["general.file_type"] = FILE_TYPES[sizes.most_common(1)[0][0]]

    def _quantized(self, module: str) -> tuple[int, Iterator[Tensor]]:
        codes, params, block = held(self.model.quantized(module), module)
        assert isinstance(block, BlockFormat)
        order = self._order(module)
        rows = torch.arange(len(codes)) if order is None else order
        step = max(1, PART // codes.shape[1])
        parts = (
            block.pack(codes[part], {name: p[part] for name, p in params.items()})
            for part in (rows[start : start + step] for start in range(0, len(rows), step))
        )
        return block.ggml_type, parts

    def _kept(self, name: str, module: str) -> tuple[int, Iterator[Tensor]]:
        """A tensor in its own type; vectors in F32, because llama.cpp adds and multiplies them so."""
        info, order = self.model.info(name), self._order(module)
        if len(info.shape) == 1 or order is not None:
            tensor = self.model.tensor(name) if order is None else self.model.tensor(name)[order]
            tensor = tensor.float() if len(info.shape) == 1 else tensor
            return PLAIN[tensor.dtype], iter([tensor])
        step = max(1, PART // info.shape[1])
        starts = range(0, info.shape[0], step)
        parts = (self.model.rows(name, start, min(start + step, info.shape[0])) for start in starts)
        return PLAIN[info.dtype], parts

    def _order(self, module: str) -> Tensor | None:
        """Order of rows in the file; None if it is the model's."""
        roles = [linear.role for linear in self.family.linears if module.endswith(f".{linear.path}")]
        return self.family.gguf_rows(self.config, roles[0]) if roles else None


def size_label(weights: int) -> str:
    """The model's size as GGUF names spell it: 135M, 1.2B."""
    unit, letter = next((u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if weights >= u[0]), (1e3, "K"))
    return f"{weights / unit:.{0 if weights >= 9.95 * unit else 1}f}{letter}"
