"""Hidden states of all calibration tokens: in memory while they are small, else in a nameless file that is mapped."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from qtool.errors import StorageError

MEMORY_LIMIT = 4 << 30
"""Bytes of hidden states kept in memory; beyond it they live in a temporary file (64k tokens of a 32k-wide model)."""


class Hidden:
    """[S, T, H] hidden states, read and replaced some samples at a time.

    Args:
        samples, length, width: S, T, H.
        dtype: of the stored values.
        limit: bytes above which a file takes them.

    Raises:
        StorageError: the file needs more room than there is.
    """

    def __init__(self, samples: int, length: int, width: int, dtype: torch.dtype, limit: int = MEMORY_LIMIT) -> None:
        self.samples, self.length, self.width, self.limit = samples, length, width, limit
        count = samples * length * width
        spilled = count * dtype.itemsize > limit
        with torch.inference_mode(False):  # gradients may be computed with them
            values = mapped(count, dtype) if spilled else torch.empty(count, dtype=dtype)
        self.values = values.view(samples, length, width)

    def like(self) -> Hidden:
        """Room for as many others."""
        return Hidden(self.samples, self.length, self.width, self.values.dtype, self.limit)

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        return self.values[part]

    def __setitem__(self, part: slice, x: Tensor) -> None:
        self.values[part] = x.to(self.values.device, self.values.dtype)


def mapped(count: int, dtype: torch.dtype) -> Tensor:
    """`count` values in a file without a name, so that it is gone when the tensor is, however the process ends.

    Its room is reserved at once: a disk that fills up behind a mapping would kill the process.

    Raises:
        StorageError: there is not enough.
    """
    nbytes = count * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="qtool-hidden-") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
        except OSError as error:
            raise StorageError(
                f"hidden states do not fit into {tempfile.gettempdir()}: {error.strerror}",
                wanted=f"{nbytes / 1e9:.1f} GB",
                hint="set TMPDIR to a larger disk, or lower calibration.samples",
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
