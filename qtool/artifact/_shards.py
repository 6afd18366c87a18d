"""A model as transformers stores it: one safetensors file, or shards of bounded size with an index.

https://huggingface.co/docs/transformers/main/big_models#sharded-checkpoints
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.hf import INDEX, WEIGHTS
from qtool.checkpoint.safetensors_io import SafetensorsWriter
from qtool.store.files import storage_errors

LIMIT = 5_000_000_000
"""Bytes of tensors in a shard, unless one set of tensors is larger."""

Pieces = Mapping[str, Mapping[str, TensorInfo]]
"""Sets of tensors that are written together: key -> name -> shape and type."""


def write_shards(
    out: Path, pieces: Pieces, read: Callable[[str], Mapping[str, Tensor]], limit: int = LIMIT
) -> list[Path]:
    """Writes a model, one piece in memory at a time.

    Args:
        out: existing folder.
        pieces: what there is, in order.
        read: gives the tensors of a piece by key.
        limit: bytes of a shard.

    Returns:
        The files.

    Raises:
        StorageError: the disk is full or not writable.
    """
    shards = _cut(pieces, limit)
    stem, suffix = WEIGHTS.rsplit(".", 1)
    names = [f"{stem}-{i:05}-of-{len(shards):05}.{suffix}" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    weight_map: dict[str, str] = {}
    for name, keys in zip(names, shards, strict=True):
        infos = {tensor: info for key in keys for tensor, info in pieces[key].items()}
        weight_map |= dict.fromkeys(infos, name)
        with SafetensorsWriter(out / name, infos) as writer:
            for key in keys:
                for tensor, content in read(key).items():
                    writer.add(tensor, content)
    files = [out / name for name in names]
    if len(shards) == 1:
        return files
    total = sum(_nbytes(piece) for piece in pieces.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with storage_errors(out):
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*files, out / INDEX]


def _cut(pieces: Pieces, limit: int) -> list[list[str]]:
    """Keys by shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, piece in pieces.items():
        if shards[-1] and size + _nbytes(piece) > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += _nbytes(piece)
    return shards


def _nbytes(piece: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in piece.values())
