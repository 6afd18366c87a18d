"""Hidden states of all calibration tokens: in memory while they are small, else in an unnamed file that is mapped."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

MEMORY_LIMIT = 4 << 30
"""Bytes of hidden states kept in memory; beyond it they live in a temporary file (64k tokens of a 32k-wide model)."""


class Hidden:
    """[S, T, H] hidden states, read and replaced some samples at a time.

    Args:
        samples, length, width: S, T, H.
        dtype: of the stored values.
        limit: bytes above which a file takes them.
    """

    def __init__(self, samples: int, length: int, width: int, dtype: torch.dtype, limit: int = MEMORY_LIMIT) -> None:
        self.samples, self.length = samples, length
        shape = (samples, length, width)
        count = samples * length * width
        if count * dtype.itemsize <= limit:
            self.values = torch.empty(shape, dtype=dtype)
            return
        self.file = tempfile.NamedTemporaryFile(prefix="qtool-hidden-")  # noqa: SIM115 (lives as long as this object)
        self.file.truncate(count * dtype.itemsize)
        self.values = torch.from_file(self.file.name, shared=True, size=count, dtype=dtype).view(shape)

    def __getitem__(self, part: slice) -> Tensor:
        return self.values[part]

    def __setitem__(self, part: slice, x: Tensor) -> None:
        self.values[part] = x.to(self.values.device, self.values.dtype)
