"""Stretches of files as tensors of bytes, read without a map."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import CheckpointError, reading


def checked_stop(start: int, stop: int | None, rows: int, what: str) -> int:
    """The row behind the last that is asked for. Raises CheckpointError: `what` has no such rows."""
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise CheckpointError(f"{what} has {rows} rows", found=f"{start} to {stop}")
    return stop


def read_bytes(path: Path, offset: int, count: int, what: str) -> Tensor:
    """Reads a stretch of a file into new memory, uint8 [count].

    Raises:
        CheckpointError: the file is gone or too short; the message names `what` was to be read.
    """
    data = torch.empty(count, dtype=torch.uint8)
    view, done = memory(data), 0
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < count and (got := file.readinto(view[done:])):
            done += got
    if done < count:
        raise CheckpointError(f"{path} ends inside {what!r}", wanted=f"{count} bytes", found=done)
    return data


def memory(data: Tensor) -> memoryview:
    """The bytes of a uint8 tensor, not copied."""
    return memoryview(data.numpy())  # type: ignore[arg-type] # numpy says so from Python 3.12 on only
