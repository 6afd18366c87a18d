"""Safetensors files: read one tensor, or some of its rows, at a time; write one tensor at a time.

The safetensors package reads. It maps files into memory, so its maps are given up as soon as a few megabytes were read
through them: a process does not grow with the model. It writes from memory, all tensors at once; here they come one
after the other, so the writer is ours. A header is believed only after every claim in it was checked, by the package,
which says nothing of where bytes lie, and before it here.
Format: https://github.com/huggingface/safetensors#format (u64 header length, JSON header, tensors without gaps).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.raw_bytes import checked_stop, memory
from qtool.errors import CheckpointError, cannot_write, one_line, reading

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the reference implementation."""
MAPPED = 1 << 23
"""Bytes that are read before a map is given up. What was read through it counts as the process's memory until then."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7 and later
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a file: what it is, and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    offset: int
    within: tuple[str, int] | None = None
    """Name of the stack of tensors [X, ...] that the file has it in, and its place there; None: it has its own name."""


class SafetensorsFile:
    """One file, its header read and checked.

    Attributes:
        path: where it is.
        entries: its tensors by name, in the order of their bytes.
        metadata: the header's `__metadata__`.

    Raises:
        CheckpointError: not a safetensors file, or one whose header lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length, limit = int.from_bytes(_header_bytes(file, 8, path), "little"), min(HEADER_LIMIT, size - 8)
            if length > limit:
                raise CheckpointError(f"{path}: impossible header length", wanted=f"at most {limit}", found=length)
            raw = _header_bytes(file, length, path)
        header = _parse_header(raw, path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = _checked_entries(header, 8 + length, size, path)
        self._map, self._read = self._opened(), 0

    def info(self, name: str) -> TensorInfo:
        """Shape and type. Raises CheckpointError: no such tensor."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        return self.entries[name].info

    def read(self, name: str, start: int = 0, stop: int | None = None, index: int | None = None) -> Tensor:
        """Reads a tensor, or its rows from `start` to `stop`, into new memory.

        Args:
            name: of the tensor.
            start: first row.
            stop: the row behind the last; None: to the end.
            index: read of the matrix at this place of a stack of them, [X, N, K], only.

        Raises:
            CheckpointError: no such tensor or rows, or the file is shorter than it was.
        """
        info, offset = self.info(name), self.entries[name].offset
        if index is not None:
            info = TensorInfo(info.shape[1:], info.dtype)
            offset += index * info.nbytes
        row_bytes = info.nbytes // max(info.shape[0], 1) if info.shape else info.nbytes
        rows = info.shape[0] if info.shape else 1
        stop = checked_stop(start, stop, rows, f"{self.path}: tensor {name!r}")
        self._refuse_short(name, offset + start * row_bytes, offset + stop * row_bytes)
        found = torch.empty((stop - start, *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        step = max(1, MAPPED // max(row_bytes, 1))
        for first in range(start, stop if row_bytes else start, step):
            last = min(first + step, stop)
            mapped = self._mapped(name, first, last, index) if info.shape else self._mapped(name)
            (found[first - start : last - start] if info.shape else found).copy_(mapped)
            del mapped  # or the map could not go
            self._read += (last - first) * row_bytes
            if self._read >= MAPPED:
                self._map, self._read = None, 0
        return found

    def _mapped(self, name: str, start: int = 0, stop: int | None = None, index: int | None = None) -> Tensor:
        """A tensor or rows of it, as they lie in the file; see `read`."""
        opened = self._map
        if opened is None:  # another thread that reads may give up its own
            opened = self._map = self._opened()
        if within := self.entries[name].within:
            name, index = within
        part = slice(start, stop) if index is None else (index, slice(start, stop))
        try:
            found: Tensor = opened.get_tensor(name) if stop is None else opened.get_slice(name)[part]
        except (SafetensorError, ValueError) as error:  # as it has them where memory is short
            raise CheckpointError(f"cannot read {name} of {self.path}: {one_line(error)}") from error
        return found

    def _opened(self) -> Any:
        """The file as the package has it. Raises CheckpointError: it sees something wrong with it."""
        try:
            with reading(self.path):
                return safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is no safetensors file: {one_line(error)}") from error

    def _refuse_short(self, name: str, start: int, stop: int) -> None:
        """Raises CheckpointError: bytes from start to stop are no longer there, and a map of them would be fatal."""
        with reading(self.path):
            size = self.path.stat().st_size
        if size < stop:
            found = max(0, size - start)
            raise CheckpointError(f"{self.path} ends inside {name!r}", wanted=f"{stop - start} bytes", found=found)


def _header_bytes(file: BinaryIO, count: int, path: Path) -> bytes:
    raw = file.read(count)
    if len(raw) < count:
        raise CheckpointError(f"{path} is no safetensors file: it ends inside its header")
    return raw


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: wrong header", wanted="a JSON object", found=type(header).__name__)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: wrong __metadata__", wanted="an object of strings", found=repr(metadata)[:60])
    return header


def _checked_entries(header: dict[str, Any], start: int, size: int, path: Path) -> dict[str, TensorPlace]:
    """Every tensor begins where the one before it ends, and the last one ends with the file."""
    spans = sorted((_checked_entry(name, claim, path) for name, claim in header.items()), key=lambda span: span[1:3])
    entries, position = {}, 0
    for name, begin, end, info in spans:
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name!r} leaves a gap or overlaps", wanted=position, found=begin)
        entries[name] = TensorPlace(info, start + begin)
        position = end
    if start + position != size:
        raise CheckpointError(f"{path} is truncated or too long", wanted=f"{start + position} bytes", found=size)
    return entries


def _checked_entry(name: str, claim: Any, path: Path) -> tuple[str, int, int, TensorInfo]:
    where = f"{path}: tensor {name[:100]!r}"
    if not name or len(name) > 512 or not name.isprintable():
        raise CheckpointError(f"{where} has an impossible name", wanted="1 to 512 printable characters")
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is described wrongly", wanted="dtype, shape, data_offsets")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has an unknown dtype", wanted=", ".join(DTYPES), found=repr(dtype)[:40])
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has an impossible shape or offsets", found=f"{shape!r:.60}, {offsets!r:.60}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where} has the wrong size", wanted=f"{nbytes} bytes", found=offsets[1] - offsets[0])
    return name, offsets[0], offsets[1], TensorInfo(tuple(shape), DTYPES[dtype])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where each tensor begins behind that; see `SafetensorsWriter`."""
    content: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    offsets: dict[str, int] = {}
    position = 0
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name] = position
        content[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape)}
        content[name]["data_offsets"] = [position, position := position + info.nbytes]
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, offsets


class SafetensorsWriter:
    """Writes a file whose tensors arrive one at a time, in any order, whole or by rows.

    The header comes first, so names, shapes and types are known from the start. Tensors are laid out by decreasing
    element size, so that each begins at a multiple of it, and otherwise in the order given.

    Args:
        path: the file; it is created or replaced.
        infos: what will be written.
        metadata: strings for the header; transformers wants {"format": "pt"}.

    Raises:
        StorageError: the file cannot be written, here and in every method.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.infos = dict(infos)
        head, self._offsets = header(infos, metadata)
        self._start = len(head)
        self._missing = {name: info.nbytes for name, info in infos.items()}
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from error
        self._write(0, memoryview(head))

    def add(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Writes a tensor, or the rows of it that begin at row `start`; each row once."""
        info = self.infos[name]
        if tensor.dtype != info.dtype or tensor.shape[1:] != info.shape[1:]:
            raise ValueError(f"{name} was announced as {info}, found {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        skip = start * info.nbytes // max(info.shape[0], 1) if info.shape else 0
        self._write(self._start + self._offsets[name] + skip, memory(data))
        self._missing[name] -= data.numel()

    def close(self) -> None:
        """Brings everything to the disk. Raises ValueError: some tensor was not written, or some row twice."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self._file.close()
        if wrong := [name for name, count in self._missing.items() if count]:
            raise ValueError(f"{self.path} was closed before these were written: {', '.join(wrong[:5])}")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _write(self, position: int, data: memoryview) -> None:
        try:
            self._file.seek(position)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.close()
            raise cannot_write(self.path, error) from error
