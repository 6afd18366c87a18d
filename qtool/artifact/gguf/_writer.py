"""Writes a model as GGUF, in one file or in parts: names, row order, types and metadata as llama.cpp expects them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qtool import registry
from qtool.artifact.gguf._options import FILE_TYPES, GGUFOptions
from qtool.artifact.gguf._tokenizer import model_name, tokenizer_metadata
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.checkpoint.families._parts import stacked
from qtool.checkpoint.gguf_checkpoint import scale_name
from qtool.checkpoint.gguf_parts import COUNT, NUMBER, TENSORS, part_path
from qtool.checkpoint.modules import modules
from qtool.errors import PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats._ggml import BlockFormat
from qtool.store.gguf_writer import ALIGNMENT, Container, Value

PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""GGUF's numbers of the types that are not quantized."""
USUAL = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "iq2_s": "iq2_m", "mxfp4": "mxfp4_moe"}
"""Type of most matrices -> the usual mix of such a file, where that is called otherwise."""
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


def block_bytes(fmt: Format, n: int, k: int) -> set[int]:
    """Bytes that a matrix of n rows and k columns may take; integers take what the smallest does that holds them."""
    return {n * (k // b.columns) * b.block_bytes for b in candidates(fmt) if k % b.columns == 0}


def in_block_type(quantized: Quantized, module: str) -> Quantized:
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
            results = ((module, block.hold(model.matrix(module).alone)) for module in modules)
            refused = next((f"{m}: {block.label}: {r}" for m, r in results if not isinstance(r, Quantized)), None)
            if refused is None:
                return block
            reasons.append(refused)
    raise PlanError(reasons, "GGUF stores the matrices of all experts in one tensor of one block type")


def usual(ggml_type: int) -> int:
    """Number of the usual mix in which most matrices have a type."""
    names = {0: "f32", 1: "f16", 30: "bf16"} | {block.ggml_type: block.__name__.lower() for block in block_types()}
    name = names[ggml_type]
    return FILE_TYPES[USUAL.get(name, name)]


class ModelWriter:
    """Writes one model.

    Args:
        model: what to write.
        path: where; parts get a number behind its stem.
        name: the model's.
        options: of the artifact.
        about: key-values on top of the model's own.
    """

    def __init__(
        self, model: QuantizedCheckpoint, path: Path, name: str, options: GGUFOptions, about: Mapping[str, Value]
    ) -> None:
        self.model, self.path, self.options = model, path, options
        self.family, self.config = model.family, model.config
        names = self.family.gguf_names(self.config)
        self.members: dict[str, list[str]] = defaultdict(list)
        for tensor in model.names():
            if tensor in names:  # others are no part of the language model
                self.members[names[tensor]].append(tensor)
        if self.family.gguf_untied and model.tied:
            self.members[names[f"{self.family.head}.weight"]] = [f"{self.family.embedding}.weight"]
        self.roles = {module.name: module.role for module in modules(model)}
        self.extra = self.family.gguf_extra_tensors(self.config)
        self.shapes = {there: tuple(tensor.shape) for there, tensor in self.extra.items()}
        for there, members in self.members.items():
            form = self.family.gguf_form(self.config, members[0])
            shape = form.shape if form else self.model.info(members[0]).shape
            self.shapes[there] = shape if stacked(members[0])[1] is None else (len(members), *shape)
            if self._has_scale(members[0]):
                self.shapes[scale_name(there)] = (len(members),)
        self.scales: list[float] = []
        weights = sum(math.prod(model.info(tensor).shape) for tensor in model.names())
        self.metadata: dict[str, Value] = {
            "general.architecture": self.family.gguf_arch,
            "general.type": "model",
            "general.name": model_name(name, model.files),
            "general.size_label": size_label(weights),
            "general.file_type": FILE_TYPES[options.file_type or "f32"],
            "general.quantization_version": 2,
            **self.family.gguf_metadata(self.config),
            **tokenizer_metadata(model.files, self.config, options.pre_tokenizer),
            **about,
        }

    def write(self) -> list[Path]:
        """Writes tensor by tensor; of a stack of experts' matrices one after the other. Returns the files.

        Raises:
            PlanError: the values of a layer do not fit any block type exactly.
            OSError: the disk is full or not writable.
        """
        parts = cut({there: self.most(there) for there in self.shapes}, self.options.split_max_size)
        paths = [part_path(self.path, i, len(parts)) for i in range(len(parts))]
        about = [split_metadata(i, len(parts), len(self.shapes)) for i in range(len(parts))]
        self.metadata |= about[0]
        sizes: Counter[int] = Counter()
        with Container(paths[0], self.metadata, self._shapes(parts[0])) as first:
            self._fill(first, sizes)
            for path, names, own in zip(paths[1:], parts[1:], about[1:], strict=True):
                with Container(path, own, self._shapes(names)) as file:
                    self._fill(file, sizes)
            if self.options.file_type is None:
                self.metadata["general.file_type"] = usual(sizes.most_common(1)[0][0])
        return paths

    def _shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {name: self.shapes[name] for name in names}

    def _fill(self, file: Container, sizes: Counter[int]) -> None:
        """Writes the tensors of one file, and counts the numbers in each type."""
        for there in file.shapes:
            if there in self.extra:
                file.add(there, PLAIN[self.extra[there].dtype], [self.extra[there]])
                continue
            if there not in self.members:  # the numbers of the matrices that were written just before
                file.add(there, PLAIN[torch.float32], [torch.tensor(self.scales)])
                self.scales.clear()
                continue
            file.add(there, *self._tensor(self.members[there]))  # nothing of it is held while the next one is read
            sizes[file.table[there][0]] += math.prod(self.shapes[there])

    def _tensor(self, names: Sequence[str]) -> tuple[int, Iterator[Tensor]]:
        """Type and bytes of what becomes one tensor."""
        modules = [name.removesuffix(".weight") for name in names]
        quantized = any(module in self.model.layers for module in modules)
        return self._quantized(modules) if quantized else self._kept(names)

    def most(self, there: str) -> int:
        """Bytes that a tensor takes at most; which block type holds integers exactly depends on them."""
        if there in self.extra:
            return self.extra[there].nbytes
        if there not in self.members:
            return 4 * self.shapes[there][0]
        layer = self.model.layers.get(self.members[there][0].removesuffix(".weight"))
        if layer is None:
            return math.prod(self.shapes[there]) * self._dtype(self.members[there]).itemsize
        n, k = self.model.info(self.members[there][0]).shape
        return len(self.members[there]) * max(block_bytes(layer.format, n, k), default=0)

    def _quantized(self, modules: Sequence[str]) -> tuple[int, Iterator[Tensor]]:
        first = in_block_type(self.model.matrix(modules[0]).alone, modules[0]) if len(modules) == 1 else None
        block = first.format if first else common_block(self.model, modules)
        assert isinstance(block, BlockFormat)
        matrices = [first] if first else (block.hold(self.model.matrix(module).alone) for module in modules)
        return block.ggml_type, (part for q in matrices for part in self._packed(q, block, self._order(modules[0])))

    def _has_scale(self, name: str) -> bool:
        """True if a weight's block type keeps a number of the matrix in a tensor of its own."""
        layer = self.model.layers.get(name.removesuffix(".weight"))
        return layer is not None and isinstance(layer.format, BlockFormat) and layer.format.matrix_scale is not None

    def _packed(self, quantized: Quantized | str, block: BlockFormat, order: Tensor | None) -> Iterator[Tensor]:
        """The bytes of a matrix, some rows at a time."""
        if not isinstance(quantized, Quantized):
            raise PlanError([f"{block.label}: {quantized}"], "GGUF cannot hold the matrices of all experts exactly")
        codes, params = quantized.codes, quantized.params
        if block.matrix_scale:
            self.scales.append(float(params[block.matrix_scale][0]))
        step = max(1, PART // codes.shape[1])
        for start in range(0, len(codes), step):
            part = slice(start, start + step) if order is None else order[start : start + step]
            yield block.pack(codes[part], {name: p[part] for name, p in params.items()})

    def _kept(self, names: Sequence[str]) -> tuple[int, Iterator[Tensor]]:
        """Tensors in their own type."""
        dtype = self._dtype(names)
        if form := self.family.gguf_form(self.config, names[0]):
            return PLAIN[dtype], iter([form.write(self.model.tensor(names[0]).float())])
        parts = (part.to(dtype) for name in names for part in self._rows(name))
        offset = self.family.gguf_offset(names[0])
        return PLAIN[dtype], (part + offset for part in parts) if offset else parts

    def _dtype(self, names: Sequence[str]) -> torch.dtype:
        """The type of what is kept; vectors and routers are in F32, because llama.cpp computes so."""
        infos = [self.model.info(name) for name in names]
        plain = self.family.gguf_form(self.config, names[0]) is None
        if not plain or len(infos[0].shape) == 1 or self._role(names[0]) == "router":
            return torch.float32
        return reduce(torch.promote_types, (info.dtype for info in infos))

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


def cut(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names of the tensors of each file.

    Args:
        sizes: bytes by name, in order.
        limit: bytes of one file, unless a single tensor is larger; None: all in one.
    """
    parts: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        size += -size % ALIGNMENT
        if limit is not None and parts[-1] and total + size > limit:
            parts.append([])
            total = 0
        parts[-1].append(name)
        total += size
    return parts


def split_metadata(index: int, count: int, tensors: int) -> dict[str, Value]:
    """What a part says about itself; nothing if it is the only one."""
    if count == 1:
        return {}
    return {NUMBER: np.uint16(index), COUNT: np.uint16(count), TENSORS: np.int32(tensors)}


def size_label(weights: int) -> str:
    """The model's size as GGUF names spell it: 135M, 1.2B."""
    unit, letter = next((u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if weights >= u[0]), (1e3, "K"))
    return f"{weights / unit:.{0 if weights >= 9.95 * unit else 1}f}{letter}"
