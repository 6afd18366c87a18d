"""All statistics of a model's inputs in a folder: a safetensors file for each decoder block, and one that says what.

    statistics.json    {"version": 2, "model": name, "fingerprint": hex, "calibration": object, "inputs":
                        {<reads>: {"shard": file, "channels": K, "tokens": T, "kinds": [name, ...],
                        "groups": {<module>: B, ...}}, ...}}
    <shard>            <reads>.<kind>.<tensor> for everything that `Statistic.state` of a kind gives, and
                       <module>.<b>.<kind>.<tensor> for each group of outputs of a module that weighs tokens
    SHA256SUMS         of all of them

What takes little room, sums and ranges of channels alone, is a single file: see `qtool.calibrate.store`.

Shape letters: K input features, T tokens, B groups of a module's outputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtool.calibrate.store import about_of
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.config import read_json
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.stats._base import InputStats, Statistic
from qtool.store.files import SUMS, read_sums, sha256, storage_errors

INDEX = "statistics.json"
SHARD = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$"


class InputEntry(BaseModel):
    """What is held of an input: its shard, K, T, the names of its statistics, and B of modules that weigh tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str = Field(pattern=SHARD)
    channels: int = Field(ge=1)
    tokens: int = Field(ge=1)
    kinds: tuple[str, ...]
    groups: dict[str, Annotated[int, Field(ge=1, le=64)]] = {}


class Index(BaseModel):
    """What statistics.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    model: str
    fingerprint: str
    calibration: dict[str, Any]
    inputs: dict[str, InputEntry]


class StatsWriter:
    """Writes statistics into an empty folder, block by block.

    Args:
        folder: exists; `qtool.store.files.new_folder` gives it its name when all is written.
        about: model, fingerprint and calibration.

    Raises:
        StorageError: the disk is full or not writable; here and in every method.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.inputs: dict[str, InputEntry] = {}

    def add(self, unit: str, stats: Mapping[str, InputStats]) -> None:
        """Writes a file.

        Args:
            unit: its stem: "block-3".
            stats: by `Module.reads`; what no token reached is left out.
        """
        stats = {reads: s for reads, s in stats.items() if s.tokens}
        tensors = {
            f"{prefix}.{statistic.name()}.{name}": tensor.cpu()
            for reads, s in stats.items()
            for prefix, view in views(reads, s)
            for statistic in view
            for name, tensor in statistic.state().items()
        }
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        with SafetensorsWriter(self.folder / f"{unit}.safetensors", infos) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        for reads, s in stats.items():
            kinds = tuple(sorted({statistic.name() for _, view in views(reads, s) for statistic in view}))
            self.inputs[reads] = InputEntry(
                shard=f"{unit}.safetensors",
                channels=s.k,
                tokens=s.tokens,
                kinds=kinds,
                groups={name: len(groups) for name, groups in s.weighted.items()},
            )

    def close(self) -> None:
        """Writes what the files hold."""
        index = Index.model_validate({**self.about, "inputs": self.inputs})
        with storage_errors(self.folder):
            (self.folder / INDEX).write_text(index.model_dump_json() + "\n", encoding="utf-8")


class StatsFolder:
    """Reads such a folder; each input when it is asked for.

    Args:
        folder: of `StatsWriter`.

    Attributes:
        index: what it holds.
        digest: changes with every byte of it.

    Raises:
        CheckpointError: it is damaged, or none, here and in every method.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.sums = folder, read_sums(folder)
        self.checked: dict[str, SafetensorsFile] = {}
        try:
            self.index = Index.model_validate(read_json(folder / INDEX))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{folder / INDEX}: {where}: {first['msg']}") from error
        self._check(INDEX)
        self.digest = sha256(folder / SUMS)

    @property
    def about(self) -> dict[str, Any]:
        """Model, fingerprint and calibration."""
        return about_of(self.index.model_dump(mode="json", exclude={"version", "inputs"}), self.folder)

    def read(self, reads: str, needs: frozenset[type[Statistic]]) -> InputStats:
        """Those statistics of an input that are needed; all of them are held."""
        entry = self.index.inputs[reads]
        file = self._shard(entry.shard)
        stats = InputStats(entry.channels, needs, groups=entry.groups)
        for name, view in views(reads, stats):
            for statistic in reversed(list(view)):  # what is used is read before what uses it
                prefix = f"{name}.{statistic.name()}."
                names = [entry for entry in file.entries if entry.startswith(prefix)]
                try:
                    statistic.load({entry.removeprefix(prefix): file.read(entry) for entry in names})
                except ValueError as error:
                    raise CheckpointError(f"{file.path}: {statistic.name()} of {name}: {error}") from error
            view.tokens = entry.tokens
        return stats

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self.checked:
            self._check(name)
            self.checked[name] = SafetensorsFile(self.folder / name)
        return self.checked[name]

    def _check(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file() or self.sums.get(name) != sha256(path):
            hint = "measure again: qtool calibrate"
            raise CheckpointError(f"{path} is missing, or other than {SUMS} says", hint=hint)


def is_stats_folder(path: Path) -> bool:
    """True for a folder of `StatsWriter`, damaged or not."""
    return os.path.isfile(path / INDEX)  # False as well where the system refuses to look


def views(reads: str, stats: InputStats) -> Iterator[tuple[str, InputStats]]:
    """What is kept of an input, by what files call it: of all tokens alike, and of each group that weighs them."""
    yield reads, stats
    for module, groups in stats.weighted.items():
        yield from ((f"{module}.{b}", view) for b, view in enumerate(groups))


def nbytes(channels: int, needs: frozenset[type[Statistic]], groups: Mapping[str, int] | None = None) -> int:
    """Bytes that statistics of an input of K channels take on disk, with B groups of the modules that weigh tokens."""
    with torch.device("meta"):
        stats = InputStats(channels, needs, "meta", groups)
        kept = (statistic for _, view in views("", stats) for statistic in view)
        return sum(tensor.nbytes for statistic in kept for tensor in statistic.state().values())
