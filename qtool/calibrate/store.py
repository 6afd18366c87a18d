"""Compact statistics on disk: sums of squares, ranges and token counts of every input, in one safetensors file.

What takes more room, Gram matrices for example, is kept in a folder: see `qtool.calibrate.shards`. The file's metadata
says which model and tokens it was measured on.

    <reads>.sum_squares, <reads>.low, <reads>.high    float32 [K]
    <reads>.tokens                                    int64 [1]
    __metadata__["qtool.statistics"]                  the version, 1
    __metadata__["about"]                             JSON: {"model": name, "fingerprint": hex, "calibration": object}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels

VERSION = "1"
VECTORS = ("sum_squares", "low", "high")
ABOUT = {"model": str, "fingerprint": str, "calibration": dict}


def write_stats(path: Path, stats: Mapping[str, InputStats], about: Mapping[str, object]) -> None:
    """Writes statistics by `Module.reads`.

    Args:
        path: of the new file.
        stats: what was measured.
        about: model, fingerprint and calibration; JSON values.

    Raises:
        StorageError: the disk is full or not writable.
    """
    tensors: dict[str, torch.Tensor] = {}
    for reads, s in stats.items():
        tensors |= {f"{reads}.{n}": t.float().cpu() for n, t in s[Channels].state().items()}
        tensors[f"{reads}.tokens"] = torch.tensor([s.tokens])
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    metadata = {"qtool.statistics": VERSION, "about": json.dumps(about, sort_keys=True)}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def is_stats(path: Path) -> bool:
    """True for what `write_stats` wrote, in whatever version. Raises CheckpointError: a damaged safetensors file."""
    return bool(_version(path))


def _version(path: Path) -> str:
    """Version of a file of statistics; empty for another kind of file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(9)[8:] != b"{":  # where the header of a safetensors file begins
                return ""
    return SafetensorsFile(path).metadata.get("qtool.statistics", "")


def read_stats(path: Path) -> tuple[dict[str, InputStats], dict[str, Any]]:
    """Reads what `write_stats` wrote: (statistics, about).

    Raises:
        CheckpointError: damaged, or not such a file.
    """
    version = _version(path)
    if version != VERSION:
        raise CheckpointError(
            f"{path} does not hold calibration statistics",
            wanted=f"version {VERSION}",
            found=version or "another kind of file",
            hint="make one with: qtool calibrate MODEL --recipe RECIPE -o STATS",
        )
    file = SafetensorsFile(path)
    stats = {n.removesuffix(".tokens"): _read_input(file, n) for n in file.entries if n.endswith(".tokens")}
    if len(file.entries) != len(stats) * (len(VECTORS) + 1):
        raise CheckpointError(f"{path} holds a tensor that belongs to no input")
    return stats, _read_about(file)


def _read_input(file: SafetensorsFile, name: str) -> InputStats:
    """The statistics of one input, by the name of its token count; nothing in them is believed unseen."""
    reads = name.removesuffix(".tokens")
    tokens = file.read(name)
    sums, low, high = vectors = [file.read(f"{reads}.{n}") for n in VECTORS]
    like = all(v.dtype == torch.float32 and v.dim() == 1 and v.shape == sums.shape for v in vectors)
    if not like or tokens.dtype != torch.int64 or tokens.shape != (1,):
        raise CheckpointError(f"{file.path}: statistics of {reads}", wanted="float32 [K] three times and int64 [1]")
    possible = (sums >= 0) & (low <= high) & sums.isfinite() & low.isfinite() & high.isfinite()
    if not possible.all() or int(tokens) < 1:
        raise CheckpointError(f"{file.path}: statistics of {reads} hold impossible numbers")
    stats = InputStats(len(sums), frozenset({Channels}))
    stats[Channels].load(dict(zip(VECTORS, vectors, strict=True)))
    stats.tokens = int(tokens)
    return stats


def _read_about(file: SafetensorsFile) -> dict[str, Any]:
    """What the statistics were measured on."""
    try:
        about = json.loads(file.metadata.get("about", ""))
    except (ValueError, RecursionError):
        about = None
    return about_of(about, file.path)


def about_of(about: object, path: Path) -> dict[str, Any]:
    """What statistics say they were measured on, checked. Raises CheckpointError: they do not say it."""
    if not isinstance(about, dict) or not all(isinstance(about.get(key), kind) for key, kind in ABOUT.items()):
        raise CheckpointError(f"{path} does not say what it was measured on", wanted=", ".join(ABOUT))
    return about
