"""Stretches of files as tensors of bytes, read without a map."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.errors import CheckpointError, reading

PIECE = 1 << 20
"""Bytes that are looked at together: they stay in a processor's cache."""
UNABLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""What systems say that do not copy between two files by themselves."""


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file.

    Attributes:
        path: the file.
        offset: of the first one.
        count: how many.
        what: they are, for messages.
    """

    path: Path
    offset: int
    count: int
    what: str

    def pieces(self) -> Iterator[Tensor]:
        """All of them in pieces, uint8 [at most PIECE], each in the memory of the one before.

        Raises:
            CheckpointError: the file is gone or too short.
        """
        data = torch.empty(min(PIECE, self.count), dtype=torch.uint8)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.count, PIECE):
                piece = data[: min(PIECE, self.count - start)]
                view, done = memory(piece), 0
                while done < len(view) and (got := file.readinto(view[done:])):
                    done += got
                if done < len(view):
                    self._short(start + done)
                yield piece

    def copy(self, file: int, position: int) -> int:
        """Copies all of them into an open file, by the system where it can, and returns how many.

        Raises:
            CheckpointError: this file is gone or too short.
            OSError: the other one cannot be written.
        """
        done = 0
        with reading(self.path):
            source = os.open(self.path, os.O_RDONLY)
        try:
            while done < self.count and hasattr(os, "copy_file_range"):
                places = self.offset + done, position + done
                try:
                    got = os.copy_file_range(source, file, self.count - done, *places)
                except OSError as error:
                    if error.errno not in UNABLE:
                        raise
                    break
                if not got:
                    if os.fstat(source).st_size <= places[0]:
                        self._short(done)
                    break  # a file system that does not say that it cannot
                done += got
        finally:
            os.close(source)
        rest = Stretch(self.path, self.offset + done, self.count - done, self.what)
        for piece in rest.pieces():
            view = memory(piece)
            while view:
                written = os.pwrite(file, view, position + done)
                view, done = view[written:], done + written
        return done

    def _short(self, found: int) -> NoReturn:
        raise CheckpointError(f"{self.path} ends inside {self.what!r}", wanted=f"{self.count} bytes", found=found)


def same_stretches(one: Stretch, other: Stretch) -> bool:
    """Whether two stretches of files hold the same bytes."""
    if one.count != other.count:
        return False
    pairs = zip(one.pieces(), other.pieces(), strict=True)
    return all(np.array_equal(words(a), words(b)) for a, b in pairs)


def words(data: Tensor) -> NDArray[Any]:
    """Bytes in the largest pieces that divide them, which are compared the quickest."""
    found = data.numpy()
    return found if len(found) % 8 else found.view(np.uint64)


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
