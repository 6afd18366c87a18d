"""What is in a file of measurements: statistics of `qtool calibrate`, or an importance matrix of llama.cpp."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qtool.calibrate.shards import StatsFolder, is_stats_folder
from qtool.calibrate.store import is_stats, read_stats
from qtool.checkpoint.gguf_io import GGUFFile
from qtool.errors import reading
from qtool.stats.channels import Channels
from qtool.store.imatrix import IMATRIX, is_imatrix, read_imatrix

STATISTICS, IMPORTANCE = "statistics", "importance matrix"


class Input(BaseModel):
    """What was measured on one input.

    Attributes:
        name: of the input; in an importance matrix, of the tensor that reads it.
        channels: K, of all experts together in an importance matrix.
        tokens: that reached it.
        rms: root mean square of its numbers.
        largest: largest magnitude; None in an importance matrix, which does not hold it.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    channels: int
    tokens: int
    rms: float
    largest: float | None


class Measurements(BaseModel):
    """A file of measurements.

    Attributes:
        source: what the user called it.
        kind: "statistics" or "importance matrix".
        about: model and tokens, as far as the file tells.
        inputs: one after the other.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    kind: str
    about: dict[str, object]
    inputs: tuple[Input, ...]


def run(source: str) -> Measurements | None:
    """Reads a file of measurements; None if it is something else.

    Raises:
        CheckpointError: it is one, and damaged.
    """
    path = Path(source)
    kind = kind_of(path)
    if kind is None:
        return None
    return _statistics(path) if kind == STATISTICS else _importance(path)


def kind_of(path: Path) -> str | None:
    """Which kind of measurements a file holds, by its first bytes; None if it is something else, or not there.

    Raises:
        CheckpointError: a damaged file.
    """
    with reading(path):
        if is_stats_folder(path):
            return STATISTICS
        if not path.is_file():
            return None
        if is_stats(path):
            return STATISTICS
        with path.open("rb") as file:
            model = file.read(4) == b"GGUF" and GGUFFile(path).metadata.get("general.type") != IMATRIX
        return IMPORTANCE if is_imatrix(path) and not model else None


def _statistics(path: Path) -> Measurements:
    if is_stats_folder(path):
        folder = StatsFolder(path)
        channels = frozenset({Channels})
        stats, about = {reads: folder.read(reads, channels) for reads in folder.index.inputs}, folder.about
    else:
        stats, about = read_stats(path)
    inputs = tuple(
        Input(
            name=reads,
            channels=s.k,
            tokens=s.tokens,
            rms=float(s[Channels].importance.double().mean().sqrt()),
            largest=float(s[Channels].absmax.max()),
        )
        for reads, s in stats.items()
    )
    return Measurements(
        source=str(path), kind=STATISTICS, about={"model": about["model"], **about["calibration"]}, inputs=inputs
    )


def _importance(path: Path) -> Measurements:
    matrix = read_imatrix(path)
    about = {"datasets": list(matrix.datasets), "chunks": matrix.chunks, "tokens per chunk": matrix.chunk_size}
    inputs = []
    for name, entry in matrix.entries.items():
        tokens, channels = float(entry.counts.sum()), entry.sums.numel()
        measured = tokens * channels / len(entry.counts)
        rms = (float(entry.sums.double().sum()) / measured) ** 0.5 if measured else 0.0
        inputs.append(Input(name=name, channels=channels, tokens=round(tokens), rms=rms, largest=None))
    return Measurements(source=str(path), kind=IMPORTANCE, about=about, inputs=tuple(inputs))
