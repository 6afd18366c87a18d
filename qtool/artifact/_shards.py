"""A model as transformers stores it: one safetensors file, or shards of bounded size with an index.

https://huggingface.co/docs/transformers/main/big_models#sharded-checkpoints
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.hf import INDEX, WEIGHTS
from qtool.checkpoint.raw_bytes import Stretch
from qtool.checkpoint.safetensors_io import SafetensorsWriter, begin, header
from qtool.numerics.threads.parallel import side_by_side, small_together
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.store.files import storage_errors

LIMIT = 5_000_000_000
"""Bytes of tensors in a shard, unless one set of tensors is larger."""

SMALL = 1 << 21
"""Bytes of a piece that one thread encodes."""

Pieces = Mapping[str, Mapping[str, TensorInfo]]
"""Sets of tensors that are written together: key -> name -> shape and type."""

Read = Callable[[str], Mapping[str, Tensor | Stretch]]
"""The tensors of a set, or where they can be copied from."""

Copies = tuple[SafetensorsWriter, Mapping[str, Stretch]]
"""A file, and its tensors that are copied."""


def write_shards(
    out: Path,
    pieces: Pieces,
    read: Read,
    limit: int = LIMIT,
    ranks: Ranks = ALONE,
) -> list[Path]:
    """Writes a model, one piece in memory at a time, or a few small ones; and copies what lies in files side by side.

    Whoever names the folder brings it to the disk.

    Args:
        out: existing folder.
        pieces: what there is, in order.
        read: gives a piece by key.
        limit: bytes of a shard.
        ranks: of several processes, each writes a share of the pieces, into files that the first one begins.

    Returns:
        The files.

    Raises:
        StorageError: the disk is full or not writable.
        ProcessError: another process ended.
    """

    def small(key: str) -> bool:
        return _nbytes(pieces[key]) <= SMALL

    shards, mine = _named(_cut(pieces, limit)), share(pieces, ranks)
    if ranks.first and ranks.size > 1:
        for name, keys in shards.items():
            begin(out / name, _infos(pieces, keys))
    ranks.barrier()
    with ExitStack() as writers:
        copies = []
        for name, keys in shards.items():
            if here := [key for key in keys if key in mine]:
                part = None if ranks.size == 1 else _infos(pieces, here)
                writer = SafetensorsWriter(out / name, _infos(pieces, keys), sync=False, mine=part)
                copies.append(_fill(writers.enter_context(writer), small_together(read, here, small)))
        side_by_side(_copy, copies)  # file by file, since a system takes bytes of one from one thread at a time
    ranks.barrier()
    files = [out / name for name in shards]
    if len(shards) == 1 or not ranks.first:
        return files
    with storage_errors(out):
        (out / INDEX).write_bytes(_index(pieces, shards))
    return [*files, out / INDEX]


def share(pieces: Pieces, ranks: Ranks) -> frozenset[str]:
    """Keys of what this process writes: pieces that follow each other, with about as many bytes as those of others."""
    sizes = {key: _nbytes(piece) for key, piece in pieces.items()}
    total, before, found = max(1, sum(sizes.values())), 0, set[str]()
    for key, size in sizes.items():
        if (2 * before + size) * ranks.size // (2 * total) == ranks.rank:  # who has its middle
            found.add(key)
        before += size
    return frozenset(found)


def _fill(writer: SafetensorsWriter, pieces: Iterable[Mapping[str, Tensor | Stretch]]) -> Copies:
    """Writes the tensors of some pieces, one after the other; what can be copied is left for `_copy`."""
    places = dict[str, Stretch]()
    for piece in pieces:
        for tensor, content in piece.items():
            if isinstance(content, Stretch):
                places[tensor] = content
            else:
                writer.add(tensor, content)
    return writer, places


def _copy(copies: Copies) -> None:
    """Copies what `_fill` left."""
    writer, places = copies
    for tensor, place in places.items():
        writer.copy(tensor, place)


def overhead(pieces: Pieces, limit: int = LIMIT) -> int:
    """Bytes that `write_shards` adds to those of the tensors: headers, and the index."""
    shards = _named(_cut(pieces, limit))
    heads = sum(len(header(_infos(pieces, keys))[0]) for keys in shards.values())
    return heads + (len(_index(pieces, shards)) if len(shards) > 1 else 0)


def _named(shards: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    """Names of the files, and the keys of what they hold."""
    stem, suffix = WEIGHTS.rsplit(".", 1)
    names = [f"{stem}-{i:05}-of-{len(shards):05}.{suffix}" for i in range(1, len(shards) + 1)]
    return dict(zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True))


def _infos(pieces: Pieces, keys: Sequence[str]) -> dict[str, TensorInfo]:
    return {tensor: info for key in keys for tensor, info in pieces[key].items()}


def _index(pieces: Pieces, shards: Mapping[str, Sequence[str]]) -> bytes:
    """Content of the file that says where tensors are."""
    total = sum(_nbytes(piece) for piece in pieces.values())
    weight_map = {tensor: name for name, keys in shards.items() for tensor in _infos(pieces, keys)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


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
