"""Safetensors files: read one tensor, or some of its rows, at a time; write one tensor at a time.

A header is believed only after every claim in it was checked, by the safetensors package, which says nothing of where
bytes lie, and before it here. What is read is read, and not mapped as the package does it: a process does not grow with
the model, and no other thread waits for a map that is made. The package writes from memory, all tensors at once; here
they come one after the other, so the writer is ours.
Format: https://github.com/huggingface/safetensors#format (u64 header length, JSON header, tensors without gaps).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.raw_bytes import Stretch, checked_stop, memory, read_bytes
from qtool.checkpoint.safetensors_header import (
    HEADER_LIMIT,
    NAMES,
    checked_entries,
    header_bytes,
    parsed_header,
)
from qtool.errors import CheckpointError, cannot_write, one_line, reading


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
            length, limit = int.from_bytes(header_bytes(file, 8, path), "little"), min(HEADER_LIMIT, size - 8)
            if length > limit:
                raise CheckpointError(f"{path}: impossible header length", wanted=f"at most {limit}", found=length)
            raw = header_bytes(file, length, path)
        header = parsed_header(raw, path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = checked_entries(header, 8 + length, size, path)
        self._check()

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
        found = read_bytes(self.path, offset + start * row_bytes, (stop - start) * row_bytes, name)
        return found.view(info.dtype).view((stop - start, *info.shape[1:]) if info.shape else ())

    def stretch(self, name: str) -> Stretch:
        """Where the bytes of a tensor lie. Raises CheckpointError: no such tensor."""
        return Stretch(self.path, self.entries[name].offset, self.info(name).nbytes, name)

    def _check(self) -> None:
        """Has the package look at the file. Raises CheckpointError: it sees something wrong with it."""
        try:
            with reading(self.path):
                safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is no safetensors file: {one_line(error)}") from error


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


def begin(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Makes a file into which several processes write a share of its tensors each; see `SafetensorsWriter`.

    Raises:
        StorageError: it cannot be made.
    """
    head, _ = header(infos)
    try:
        path.write_bytes(head)
        os.truncate(path, len(head) + sum(info.nbytes for info in infos.values()))
    except OSError as error:
        raise cannot_write(path, error) from error


class SafetensorsWriter:
    """Writes a file whose tensors arrive one at a time, in any order, whole or by rows.

    The header comes first, so names, shapes and types are known from the start. Tensors are laid out by decreasing
    element size, so that each begins at a multiple of it, and otherwise in the order given.

    Args:
        path: the file; it is created or replaced.
        infos: what will be written.
        metadata: strings for the header; transformers wants {"format": "pt"}.
        sync: whether closing brings all to the disk; else whoever gives the file or its folder a name does.
        mine: those of the tensors that are written here, into a file that another process began; None: all, into a new
            one.

    Raises:
        StorageError: the file cannot be written, here and in every method.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        sync: bool = True,
        mine: Collection[str] | None = None,
    ) -> None:
        self.path, self._sync = path, sync
        self.infos = dict(infos)
        head, self._offsets = header(infos, metadata)
        self._start = len(head)
        self._missing = {name: info.nbytes for name, info in infos.items() if mine is None or name in mine}
        try:
            self._file = path.open("wb" if mine is None else "r+b", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from error
        if mine is None:
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

    def copy(self, name: str, stretch: Stretch) -> None:
        """Writes a tensor whose bytes lie in another file. Raises CheckpointError: they no longer do."""
        wanted = self.infos[name].nbytes
        if stretch.count != wanted:
            raise ValueError(f"{name} was announced with {wanted} bytes, found {stretch.count}")
        try:
            self._missing[name] -= stretch.copy(self._file.fileno(), self._start + self._offsets[name])
        except OSError as error:
            self._file.close()
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Ends the file; see `sync`. Raises ValueError: some tensor was not written, or some row twice."""
        try:
            if self._sync:
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
