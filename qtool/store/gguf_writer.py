"""The GGUF container, version 3, written in one pass.

    "GGUF", u32 version, u64 tensors, u64 key-values, key-values, tensor table, padding, tensor data, each padded

Types and offsets of tensors have a fixed size in the table, so tensors are written first, behind room for the header,
and the header once everything is known: a tensor's type may depend on its data.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

Value = bool | int | float | str | list[str] | list[int] | list[float] | np.uint16 | np.int32
ALIGNMENT = 32
UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9


class Container:
    """A GGUF file in the making; a context manager.

    Args:
        path: where to write.
        metadata: key-values; what is changed before the file is closed may not change its size.
        shapes: name -> shape of every tensor, last extent fastest, in the order in which they will be added.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.metadata = metadata
        self.shapes = shapes
        self.table = dict.fromkeys(shapes, (0, 0))  # type, offset
        self._file = path.open("wb")
        self._start = len(self._header())
        self._file.seek(self._start)

    def add(self, name: str, ggml_type: int, parts: Iterable[Tensor]) -> None:
        """Writes one tensor.

        Args:
            name: as in `shapes`.
            ggml_type: number of its type.
            parts: its bytes, in tensors of any type and shape.
        """
        self.table[name] = (ggml_type, self._file.tell() - self._start)
        for part in parts:
            self._file.write(part.contiguous().view(torch.uint8).numpy().data)
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(self._header())

    def _header(self) -> bytes:
        return header(self.metadata, self.shapes, self.table)


def header(
    metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], table: Mapping[str, tuple[int, int]]
) -> bytes:
    """What stands before the tensors.

    Args:
        metadata: key-values.
        shapes: name -> shape of every tensor, in order.
        table: type and offset of every tensor.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(shapes), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    for name, shape in shapes.items():
        parts += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", *table[name]))
    return b"".join([*parts, bytes(-sum(map(len, parts)) % ALIGNMENT)])


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


@lru_cache(maxsize=4)
def _strings(items: tuple[str, ...]) -> bytes:
    """Vocabularies are asked for again and again where many plans of a model are looked at."""
    return b"".join(map(_string, items))


def _value(value: Value) -> bytes:
    """A value behind its type: whole numbers are u32 unless numpy says otherwise (in arrays i32), others f32."""
    if isinstance(value, np.uint16 | np.int32):
        return struct.pack("<I", UINT16 if isinstance(value, np.uint16) else INT32) + value.tobytes()
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    kind = STRING if isinstance(value[0], str) else FLOAT32 if isinstance(value[0], float) else INT32
    data = struct.pack("<IIQ", ARRAY, kind, len(value))
    if kind == STRING:
        return data + _strings(tuple(map(str, value)))
    return data + struct.pack(f"<{len(value)}{'f' if kind == FLOAT32 else 'i'}", *value)
