"""Importance matrices as llama.cpp writes and reads them: sums of squared inputs of every weight, per channel.

GGUF layout (llama-imatrix's own): `general.type` is "imatrix"; `imatrix.datasets`, `imatrix.chunk_count` and
`imatrix.chunk_size` say what was measured; two F32 tensors for every weight, by its name in GGUF files of the model:

    blk.0.ffn_down.weight.in_sum2    [M, K]    sum of x^2 over tokens
    blk.0.ffn_down.weight.counts     [M, 1]    tokens

The layout before that (.dat), little-endian, of which values / ncall is the mean of x^2:

    i32 entries; of each i32 length, name, i32 ncall, i32 M * K, f32 [M * K]; if at all i32 chunks, i32 length, dataset

Shape letters: M matrices of a tensor (experts, else 1), K input features.
Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/imatrix.cpp
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.gguf_io import GGUFFile
from qtool.errors import CheckpointError
from qtool.store.gguf_writer import Container, Value

IMATRIX, SUMS, COUNTS = "imatrix", ".in_sum2", ".counts"
LEGACY_CHUNK = 512
"""Tokens of a chunk where the file does not say so; what llama.cpp assumes as well."""
NAME_LIMIT = 64
"""Bytes of a tensor's name in GGUF."""


@dataclass(frozen=True)
class ImportanceEntry:
    """What was measured on the inputs of one tensor.

    Attributes:
        sums: of squares, float32 [M, K]; a legacy file does not say what M is, and everything is in one row.
        counts: tokens, float32 [M], or [1] for all of them.
    """

    sums: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ImportanceMatrix:
    """A whole file.

    Attributes:
        entries: by the weight's name in GGUF.
        datasets: names of the texts.
        chunks, chunk_size: of the texts, in tokens each.
    """

    entries: Mapping[str, ImportanceEntry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def about_importance(source: Mapping[str, Any] | None) -> dict[str, Value]:
    """What a GGUF file says about the importance matrix that it was made with, in the keys of llama-quantize.

    Args:
        source: file name, datasets, number of entries, and chunks; see `Artifact.write`. None: without.
    """
    if source is None:
        return {}
    dataset = next(iter(source["datasets"]), "")
    dataset = dataset if dataset.startswith("hf:") else Path(dataset).name  # not where it lies on this machine
    known = {"file": Path(source["data"]).name, "dataset": dataset}
    known |= {"entries_count": source["entries"], "chunks_count": source["samples"]}
    return {f"quantize.imatrix.{key}": value for key, value in known.items() if value}


def is_imatrix(path: Path) -> bool:
    """True for the GGUF layout, and for anything that has a legacy file's first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    return start[:4] == b"GGUF" or (len(start) == 8 and start[7] == 0 and start[4] in range(1, NAME_LIMIT))


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Writes the GGUF layout, entries by name.

    Raises:
        OSError: the disk is full or not writable.
    """
    metadata: dict[str, Value] = {
        "general.type": IMATRIX,
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    tensors = {}
    for name, entry in sorted(matrix.entries.items()):
        one = len(entry.sums) == 1  # ggml does not write trailing extents of 1
        tensors[name + SUMS] = entry.sums[0] if one else entry.sums
        tensors[name + COUNTS] = entry.counts if one else entry.counts[:, None]
    with Container(path, metadata, {name: tuple(tensor.shape) for name, tensor in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.add(name, 0, [tensor])


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Reads either layout.

    Raises:
        CheckpointError: damaged, or another kind of file.
    """
    with path.open("rb") as file:
        matrix = _read_gguf(path) if file.read(4) == b"GGUF" else _read_legacy(path)
    for name, entry in matrix.entries.items():
        for part in (entry.sums, entry.counts):
            if not (part.isfinite() & (part >= 0)).all():
                raise CheckpointError(f"{path}: {name} holds impossible numbers", wanted="finite ones from 0")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GGUFFile(path)
    datasets, chunks, size = (file.metadata.get(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size"))
    names = datasets if isinstance(datasets, list) and all(isinstance(name, str) for name in datasets) else None
    kind = file.metadata.get("general.type")
    if kind != IMATRIX or names is None or not isinstance(chunks, int) or not isinstance(size, int):
        raise CheckpointError(f"{path} is no importance matrix", wanted="general.type imatrix", found=repr(kind)[:40])
    entries = {}
    for name in file.tensors:
        if name.endswith(SUMS):
            weight = name.removesuffix(SUMS)
            entries[weight] = _entry(file, weight)
    if 2 * len(entries) != len(file.tensors) or not entries:
        raise CheckpointError(f"{path} is no importance matrix", wanted=f"pairs of *{SUMS} and *{COUNTS}")
    return ImportanceMatrix(entries, tuple(names), chunks, size)


def _entry(file: GGUFFile, weight: str) -> ImportanceEntry:
    """The two tensors of a weight; only their numbers are still to be believed."""
    sums, counts = file.tensors[weight + SUMS], file.tensors.get(weight + COUNTS)
    if (
        counts is None
        or sums.kind
        or counts.kind
        or len(sums.shape) > 2
        or max(counts.shape) != math.prod(counts.shape)
    ):
        raise CheckpointError(f"{file.path}: {weight}", wanted=f"F32 {SUMS} [M, K] and F32 {COUNTS} [M, 1]")
    found = ImportanceEntry(file.read(weight + SUMS).view(-1, sums.shape[-1]), file.read(weight + COUNTS).flatten())
    if len(found.counts) not in (1, len(found.sums)):
        raise CheckpointError(f"{file.path}: {weight}", wanted=f"{len(found.sums)} counts", found=len(found.counts))
    return found


def _read_legacy(path: Path) -> ImportanceMatrix:
    rest = Bytes(path)
    entries = dict(rest.entries())
    chunks = rest.number("number of chunks", 0, 2**31) if rest.left else 0
    datasets = [rest.text(rest.number("length of a name", 0, 2**16))] if rest.left else []
    if rest.left:
        raise CheckpointError(f"{path}: {rest.left} bytes too many for an importance matrix")
    return ImportanceMatrix(entries, tuple(datasets), chunks, LEGACY_CHUNK)


class Bytes:
    """A legacy file, read from front to back; what it claims is believed only as far as its size allows."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.position = path, path.read_bytes(), 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self.data) - self.position

    def take(self, count: int) -> bytes:
        """The next bytes. Raises CheckpointError: there are less."""
        if count > self.left:
            raise CheckpointError(
                f"{self.path} is truncated, or no importance matrix", wanted=f"{count} bytes", found=self.left
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, what: str, low: int, high: int) -> int:
        """The next i32. Raises CheckpointError: out of range."""
        found: int = struct.unpack("<i", self.take(4))[0]
        if not low <= found < high:
            raise CheckpointError(f"{self.path}: impossible {what}", wanted=f"{low} to {high - 1}", found=found)
        return found

    def text(self, length: int) -> str:
        """The next text. Raises CheckpointError: not UTF-8."""
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: a name is not UTF-8") from None

    def entries(self) -> Iterator[tuple[str, ImportanceEntry]]:
        """All entries; sums and counts as if every chunk had `LEGACY_CHUNK` tokens."""
        seen = set()
        for _ in range(self.number("number of entries", 1, 2**24)):
            name = self.text(self.number("length of a name", 1, NAME_LIMIT))
            if name in seen or not name.isprintable():
                raise CheckpointError(f"{self.path}: repeated or unprintable name", found=repr(name)[:80])
            seen.add(name)
            calls = self.number(f"number of calls of {name}", 1, 2**31)
            count = self.number(f"number of values of {name}", 1, 2**31)
            values = torch.frombuffer(bytearray(self.take(4 * count)), dtype=torch.float32)
            yield name, ImportanceEntry(values[None] * LEGACY_CHUNK, torch.tensor([float(calls * LEGACY_CHUNK)]))
