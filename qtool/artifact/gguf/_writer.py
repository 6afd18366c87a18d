"""Writes a model as one GGUF file: names, row order, types and metadata as llama.cpp expects them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from pathlib import Path

import torch
from torch import Tensor

from qtool import registry
from qtool.artifact.gguf._container import Container, Value
from qtool.artifact.gguf._tokenizer import model_name, tokenizer_metadata
from qtool.checkpoint._base import QuantizedCheckpoint, modules
from qtool.checkpoint.families._base import stacked
from qtool.errors import PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats._ggml import BlockFormat

PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""GGUF's numbers of the types that are not quantized."""
FILE_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 8: 7, 6: 8, 7: 9, 30: 32}
"""Number of a tensor type -> of a file that is mostly of that type (`llama_ftype` in llama.h)."""
PART = 1 << 22
"""Weights that are packed and written at once."""


@cache
def block_types() -> tuple[type[BlockFormat], ...]:
    """All block types that qtool knows, smallest first."""
    known = [registry.load("formats", name) for name in registry.names("formats")]
    blocks = [fmt for fmt in known if issubclass(fmt, BlockFormat)]
    return tuple(sorted(blocks, key=lambda block: block.block_bytes / block.columns))


@cache
def candidates(fmt: Format) -> tuple[BlockFormat, ...]:
    """Block types that may hold matrices in a format, smallest first."""
    if isinstance(fmt, BlockFormat):
        return (fmt,)
    return tuple(block for block in (cls() for cls in block_types()) if block.may_hold(fmt) is None)


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


def common_block(model: QuantizedCheckpoint, modules: Sequence[str]) -> BlockFormat:
    """The smallest block type that holds all of some matrices exactly, which are to become one tensor.

    Raises:
        PlanError: none does.
    """
    formats = {layer and layer.format for layer in map(model.layers.get, modules)}
    reasons = [f"{modules[0]} and others have different formats; let one rule decide all experts"]
    if len(formats) == 1 and (fmt := formats.pop()):
        if isinstance(fmt, BlockFormat):
            return fmt
        reasons = []
        for block in candidates(fmt):
            results = ((module, block.hold(model.quantized(module))) for module in modules)
            refused = next((f"{m}: {block.label}: {r}" for m, r in results if not isinstance(r, Quantized)), None)
            if refused is None:
                return block
            reasons.append(refused)
    raise PlanError(reasons, "GGUF stores the matrices of all experts in one tensor of one block type")


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
        names = self.family.gguf_names(self.config)
        self.members: dict[str, list[str]] = defaultdict(list)
        for tensor in model.names():
            self.members[names[tensor]].append(tensor)
        self.roles = {module.name: module.role for module in modules(model)}
        self.extra = self.family.gguf_extra_tensors(self.config)
        weights = sum(math.prod(model.info(tensor).shape) for tensor in model.names())
        self.metadata: dict[str, Value] = {
            "general.architecture": self.family.gguf_arch,
            "general.type": "model",
            "general.name": model_name(name, model.files),
            "general.size_label": size_label(weights),
            "general.file_type": 0,
            "general.quantization_version": 2,
            **self.family.gguf_metadata(self.config),
            **tokenizer_metadata(model.files, self.config, pre_tokenizer),
        }

    def write(self) -> None:
        """Writes tensor by tensor; of a stack of experts' matrices one after the other.

        Raises:
            PlanError: the values of a layer do not fit any block type exactly.
            OSError: the disk is full or not writable.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.extra.items()}
        for there, names in self.members.items():
            shape = self.model.info(names[0]).shape
            shapes[there] = shape if stacked(names[0])[1] is None else (len(names), *shape)
        sizes: Counter[int] = Counter()
        with Container(self.path, self.metadata, shapes) as file:
            for name, tensor in self.extra.items():
                file.add(name, PLAIN[tensor.dtype], [tensor])
            for there, names in self.members.items():
                modules = [name.removesuffix(".weight") for name in names]
                quantized = any(module in self.model.layers for module in modules)
                ggml_type, parts = self._quantized(modules) if quantized else self._kept(names)
                file.add(there, ggml_type, parts)
                sizes[ggml_type] += math.prod(shapes[there])
            self.metadata["general.file_type"] = FILE_TYPES[sizes.most_common(1)[0][0]]

    def _quantized(self, modules: Sequence[str]) -> tuple[int, Iterator[Tensor]]:
        first = held(self.model.quantized(modules[0]), modules[0]) if len(modules) == 1 else None
        block = first.format if first else common_block(self.model, modules)
        assert isinstance(block, BlockFormat)
        matrices = [first] if first else (block.hold(self.model.quantized(module)) for module in modules)
        return block.ggml_type, (part for q in matrices for part in self._packed(q, block, self._order(modules[0])))

    def _packed(self, quantized: Quantized | str, block: BlockFormat, order: Tensor | None) -> Iterator[Tensor]:
        """The bytes of a matrix, some rows at a time."""
        assert isinstance(quantized, Quantized)  # the block type was chosen so
        codes, params, _ = quantized
        rows = torch.arange(len(codes)) if order is None else order
        step = max(1, PART // codes.shape[1])
        for part in (rows[start : start + step] for start in range(0, len(rows), step)):
            yield block.pack(codes[part], {name: p[part] for name, p in params.items()})

    def _kept(self, names: Sequence[str]) -> tuple[int, Iterator[Tensor]]:
        """Tensors in their own type; vectors and routers in F32, because llama.cpp computes so."""
        infos = [self.model.info(name) for name in names]
        dtype = reduce(torch.promote_types, (info.dtype for info in infos))
        if len(infos[0].shape) == 1 or self._role(names[0]) == "router":
            dtype = torch.float32
        parts = (part.to(dtype) for name in names for part in self._rows(name))
        offset = self.family.gguf_offset(names[0])
        return PLAIN[dtype], (part + offset for part in parts) if offset else parts

    def _rows(self, name: str) -> Iterator[Tensor]:
        """A tensor, some rows at a time, in their order in the file."""
        shape, order = self.model.info(name).shape, self._order(name)
        if order is not None:
            yield self.model.tensor(name)[order]
            return
        step = max(1, PART // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield self.model.rows(name, start, min(start + step, shape[0]))

    def _role(self, name: str) -> str:
        """Of a module, or of the module whose weight or bias it is."""
        return self.roles.get(name) or self.roles.get(name.rpartition(".")[0], "")

    def _order(self, name: str) -> Tensor | None:
        """Order of rows in the file; None if it is the model's."""
        return self.family.gguf_rows(self.config, self._role(name))


def size_label(weights: int) -> str:
    """The model's size as GGUF names spell it: 135M, 1.2B."""
    unit, letter = next((u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if weights >= u[0]), (1e3, "K"))
    return f"{weights / unit:.{0 if weights >= 9.95 * unit else 1}f}{letter}"
