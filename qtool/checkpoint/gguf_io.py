"""GGUF files: header parsed and checked here, tensors read one at a time and decoded by the gguf package.

The package's own reader believes every count and maps the file into memory; this one believes nothing and reads.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from qtool.checkpoint.raw_bytes import checked_stop, read_bytes
from qtool.errors import CheckpointError, reading

HEADER_LIMIT = 2**29
"""Bytes; a vocabulary of a million tokens takes a tenth of it."""
COUNT_LIMIT = 2**24
NAME_LIMIT = 64
"""Bytes of a tensor's name (GGML_MAX_NAME)."""
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""GGUF value type -> struct format."""
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""ggml types that are stored as torch stores them."""
BLOCKS = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
"""ggml type -> (weights, bytes) of a block."""
DECODED_AT_ONCE = 2**22
"""Weights; bounds what the decoders take beside the result."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        shape: as torch has it, so the last extent is the length of a row.
        kind: ggml type number.
        offset: from the start of the file, bytes.
        nbytes: stored bytes.
        path: of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int
    path: Path

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoded tensor."""
        return PLAIN.get(self.kind, torch.float32)


class GGUFFile:
    """One file, its header read and checked.

    Attributes:
        path: where it is.
        metadata: key-values; arrays are lists.
        tensors: by name, in the order of their bytes.
        header: the raw bytes before the tensors.

    Raises:
        CheckpointError: no GGUF file, or one whose header lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), path.open("rb") as file:
            cursor = _Cursor(path, file)
            count, pairs = cursor.start()
            self.metadata = cursor.named(pairs, "key", 2**16, lambda: cursor.value(cursor.number("<I")))
            claims = cursor.named(count, "tensor", NAME_LIMIT, cursor.claim)
            alignment = self.metadata.get("general.alignment", 32)
            if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 4096):
                raise CheckpointError(f"{path}: impossible alignment", found=repr(alignment)[:40])
            self.tensors = _checked(path, claims, cursor.position, alignment, cursor.size)
            file.seek(0)
            self.header = file.read(cursor.position)
        self._check_decoders()

    def find(self, name: str, index: int | None = None) -> GGUFTensor:
        """A tensor, or of a stack of matrices the one at that place. Raises CheckpointError: no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        stored = self.tensors[name]
        if index is None:
            return stored
        nbytes = stored.nbytes // stored.shape[0]
        return GGUFTensor(stored.shape[1:], stored.kind, stored.offset + index * nbytes, nbytes, stored.path)

    def read(self, name: str, start: int = 0, stop: int | None = None, index: int | None = None) -> Tensor:
        """Reads and decodes a tensor, or its rows from `start` to `stop`; float32 if it is stored in blocks.

        Args:
            name: of the tensor.
            start: first row.
            stop: the row behind the last; None: to the end.
            index: read of the matrix at this place of a stack of them, [X, N, K], only.

        Raises:
            CheckpointError: no such tensor or rows, or the file is shorter than it was.
        """
        stored = self.find(name, index)
        rows = stored.shape[0]
        stop = checked_stop(start, stop, rows, f"{self.path}: tensor {name!r}")
        row_bytes = stored.nbytes // rows
        if stored.kind in PLAIN:
            data = read_bytes(stored.path, stored.offset + start * row_bytes, (stop - start) * row_bytes, name)
            return data.view(stored.dtype).view(stop - start, *stored.shape[1:])
        result = torch.empty(stop - start, *stored.shape[1:])
        step = max(1, DECODED_AT_ONCE // math.prod(stored.shape[1:]))
        for row in range(start, stop, step):
            end = min(row + step, stop)
            data = read_bytes(stored.path, stored.offset + row * row_bytes, (end - row) * row_bytes, name)
            result[row - start : end - start] = decode(data, stored.kind).view(end - row, *stored.shape[1:])
        return result

    def _check_decoders(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.kind not in PLAIN:
                try:
                    decode(torch.zeros(BLOCKS[tensor.kind][1], dtype=torch.uint8), tensor.kind)
                except NotImplementedError:
                    kind = gguf.GGMLQuantizationType(tensor.kind).name
                    raise CheckpointError(
                        f"{self.path}: the gguf package cannot decode tensor {name!r}", found=f"type {kind}"
                    ) from None


def decode(data: Tensor, kind: int) -> Tensor:
    """Decodes whole blocks, uint8 [bytes] -> float32 [weights]."""
    with np.errstate(all="ignore"):  # damaged scales may be NaN or Inf; whoever uses the weights checks them
        return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType(kind)))


class _Cursor:
    """Reads the header from front to back and refuses whatever cannot be true."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.position = path, file, 0
        self.size = os.fstat(file.fileno()).st_size

    def fail(self, what: str, **details: Any) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what} (byte {self.position})", **details)

    def take(self, count: int) -> bytes:
        if count > min(self.size, HEADER_LIMIT) - self.position:
            raise self.fail("the header claims more bytes than the file can hold", found=count)
        self.position += count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.fail("impossible length of a string", wanted=f"at most {limit}", found=length)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None

    def start(self) -> tuple[int, int]:
        if self.size < 24 or self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file")
        version = self.number("<I")
        if version not in (2, 3):
            big = "a big-endian file" if version & 0xFFFF == 0 else version
            raise self.fail("wrong GGUF version", wanted="2 or 3, little-endian", found=big)
        count, pairs = self.number("<Q"), self.number("<Q")
        if max(count, pairs) > COUNT_LIMIT:
            raise self.fail("impossible number of tensors or keys", found=max(count, pairs))
        return count, pairs

    def named(self, count: int, what: str, limit: int, item: Callable[[], Any]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(limit)
            if not name or not name.isprintable() or name in items:
                raise self.fail(f"empty, unprintable or repeated {what}", found=repr(name)[:80])
            items[name] = item()
        return items

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text(HEADER_LIMIT)
        if kind != ARRAY:
            raise self.fail("unknown type of a value", found=kind)
        kind, count = self.number("<I"), self.number("<Q")
        if count > COUNT_LIMIT:
            raise self.fail("impossible length of an array", found=count)
        if kind in SCALARS:
            form = SCALARS[kind]
            return list(struct.unpack(f"<{count}{form[1]}", self.take(count * struct.calcsize(form))))
        if kind == STRING:
            return [self.text(HEADER_LIMIT) for _ in range(count)]
        raise self.fail("unknown type of an array's values", found=kind)

    def claim(self) -> tuple[tuple[int, ...], int, int]:
        count = self.number("<I")
        if not 1 <= count <= 4:
            raise self.fail("impossible number of dimensions", wanted="1 to 4", found=count)
        extents = struct.unpack(f"<{count}Q", self.take(8 * count))
        return extents[::-1], self.number("<I"), self.number("<Q")


def _checked(path: Path, claims: dict[str, Any], position: int, alignment: int, size: int) -> dict[str, GGUFTensor]:
    """Every tensor begins at the aligned end of the one before it, and all of them lie in the file."""
    tensors: dict[str, GGUFTensor] = {}
    start = expected = position + -position % alignment
    for name, (shape, kind, offset) in sorted(claims.items(), key=lambda item: item[1][2]):
        if kind not in BLOCKS:
            raise CheckpointError(f"{path}: tensor {name!r} has an unknown ggml type", found=kind)
        block, block_bytes = BLOCKS[kind]
        if min(shape) < 1 or shape[-1] % block or (block > 1 and len(shape) == 1):
            raise CheckpointError(f"{path}: tensor {name!r} has an impossible shape", found=list(shape))
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset != expected:
            raise CheckpointError(
                f"{path}: tensor {name!r} leaves a gap or overlaps", wanted=f"offset {expected - start}", found=offset
            )
        if expected + nbytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends behind it", wanted=f"{expected + nbytes} bytes", found=size
            )
        tensors[name] = GGUFTensor(tuple(shape), kind, expected, nbytes, path)
        expected += nbytes + -nbytes % alignment
    return tensors
