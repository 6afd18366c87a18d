"""Headers of safetensors files, of which nothing is believed that was not checked.

Format: https://github.com/huggingface/safetensors#format (u64 header length, JSON header, tensors without gaps).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qtool.checkpoint._base import TensorInfo
from qtool.errors import CheckpointError

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the reference implementation."""

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


def header_bytes(file: BinaryIO, count: int, path: Path) -> bytes:
    """The next bytes. Raises CheckpointError: there are not as many."""
    raw = file.read(count)
    if len(raw) < count:
        raise CheckpointError(f"{path} is no safetensors file: it ends inside its header")
    return raw


def parsed_header(raw: bytes, path: Path) -> dict[str, Any]:
    """What a header says. Raises CheckpointError: it is no object of JSON, or a name occurs twice."""

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


def checked_entries(header: dict[str, Any], start: int, size: int, path: Path) -> dict[str, TensorPlace]:
    """Tensors by name; each begins where the one before it ends, and the last one ends with the file."""
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
