"""Compact statistics on disk: sums of squares, ranges and token counts of every input, in one safetensors file.

Gram matrices are not kept: they are as large as the model, and a sequential method wants them behind layers that are
already quantized. The file's metadata says which model and tokens it was measured on.

    <reads>.sum_squares, <reads>.low, <reads>.high    float32 [K]
    <reads>.tokens                                    int64 [1]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.stats import InputStats

VERSION = "1"


def write_stats(path: Path, stats: Mapping[str, InputStats], about: Mapping[str, object]) -> None:
    """Writes statistics by `Module.reads`.

    Args:
        path: of the new file.
        stats: what was measured.
        about: model, its fingerprint, and calibration, for the metadata; JSON values.

    Raises:
        StorageError: the disk is full or not writable.
    """
    tensors: dict[str, torch.Tensor] = {}
    for reads, s in stats.items():
        tensors |= {f"{reads}.{n}": getattr(s, n).float().cpu() for n in ("sum_squares", "low", "high")}
        tensors[f"{reads}.tokens"] = torch.tensor([s.tokens])
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    metadata = {"qtool.statistics": VERSION, "about": json.dumps(about, sort_keys=True)}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def read_stats(path: Path) -> tuple[dict[str, InputStats], dict[str, object]]:
    """Reads what `write_stats` wrote: (statistics, about).

    Raises:
        CheckpointError: damaged, or not such a file.
    """
    file = SafetensorsFile(path)
    if file.metadata.get("qtool.statistics") != VERSION:
        raise CheckpointError(
            f"{path} does not hold calibration statistics",
            wanted=f"version {VERSION}",
            found=file.metadata.get("qtool.statistics", "another kind of file"),
            hint="make one with: qtool calibrate MODEL --recipe RECIPE -o STATS",
        )
    stats = {}
    for name in file.entries:
        if name.endswith(".tokens"):
            reads = name.removesuffix(".tokens")
            sums = file.read(f"{reads}.sum_squares")
            stats[reads] = s = InputStats(len(sums), frozenset())
            s.sum_squares, s.low, s.high = sums, file.read(f"{reads}.low"), file.read(f"{reads}.high")
            s.tokens = int(file.read(name))
    return stats, json.loads(file.metadata.get("about", "{}"))
