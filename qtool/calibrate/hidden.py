"""Hidden states of all calibration tokens: in memory while they are small, else in a nameless file that is mapped."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from qtool.errors import StorageError
from qtool.numerics.threads.parallel import CPU

MEMORY_LIMIT = 4 << 30
"""Bytes of hidden states kept in memory; beyond it they live in a temporary file (64k tokens of a 32k-wide model)."""

DEVICE_PART = 16
"""Hidden states stay on a CUDA device if they take no larger part of its memory than one in so many."""

WAITING_PART, BESIDE_PART = 4, 16
"""Batches wait on a CUDA device, instead of starting anew, if that takes no larger part of its memory: of one for
whatever there is, and of one where a block is to be trained, so that finding its start takes no more than training."""


class Hidden:
    """[S, T, H] hidden states, read and replaced some samples at a time.

    Args:
        samples, length, width: S, T, H.
        dtype: of the stored values.
        limit: bytes above which a file takes them.
        device: where blocks are run; if it has room for them, they stay there.

    Attributes:
        tokens: that they come from, int64 [S, T], where blocks may want to know.

    Raises:
        StorageError: the file needs more room than there is.
    """

    tokens: Tensor | None = None

    def __init__(
        self,
        samples: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        limit: int = MEMORY_LIMIT,
        device: torch.device = CPU,
    ) -> None:
        self.samples, self.length, self.width, self.limit, self.device = samples, length, width, limit, device
        count = samples * length * width
        with torch.inference_mode(False):  # gradients may be computed with them
            if has_room(device, count * dtype.itemsize):
                values = torch.empty(count, dtype=dtype, device=device)
            elif count * dtype.itemsize > limit:
                values = mapped(count, dtype)
            else:
                values = torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")
        self.values = values.view(samples, length, width)

    def like(self) -> Hidden:
        """Room for as many others."""
        other = Hidden(self.samples, self.length, self.width, self.values.dtype, self.limit, self.device)
        other.tokens = self.tokens
        return other

    def place(self, part: slice) -> tuple[int, int]:
        """What tells some samples from others, in front of every block."""
        assert self.tokens is not None
        return self.tokens.data_ptr(), part.start or 0

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        return self.values[part]

    def __setitem__(self, part: slice, x: Tensor) -> None:
        self.values[part].copy_(x.to(self.values.dtype))  # straight into pages that cannot move, if these are some


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether so many bytes may stay on a CUDA device."""
    return device.type == "cuda" and nbytes * DEVICE_PART <= torch.cuda.get_device_properties(device).total_memory


def waiting_limit(device: torch.device, trains: bool = False) -> int:
    """Bytes that the intermediates of all batches may take on a device while they wait for layers to be solved.

    Args:
        device: where they wait.
        trains: whether the block is trained when its layers are solved.
    """
    if device.type != "cuda":
        return MEMORY_LIMIT
    return int(torch.cuda.get_device_properties(device).total_memory) // (BESIDE_PART if trains else WAITING_PART)


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
