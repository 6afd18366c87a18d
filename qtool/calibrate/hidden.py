"""Hidden states of all calibration tokens: in memory while they are small, else in a nameless file that is mapped."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from qtool.errors import StorageError
from qtool.limits import free_memory
from qtool.numerics.threads.parallel import CPU

MEMORY_LIMIT = 4 << 30
"""Bytes of hidden states kept in memory; beyond it they live in a temporary file (64k tokens of a 32k-wide model)."""

PINNED_PART = 4
"""Beside a CUDA device more of them stay in memory, one in so many of the bytes that are free, in pages that the device
reads while it computes."""

DEVICE_PART = 16
"""Hidden states stay on a CUDA device if they take no larger part of its memory than one in so many."""

AHEAD = 2
"""Parts that may be asked for before a device is done with those in front of them."""

LIMITED = "get_per_process_memory_fraction"
"""Of torch.cuda; older releases do not tell."""

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
        count, pinned = samples * length * width, device.type == "cuda"
        most = max(limit, free_memory() / PINNED_PART) if pinned else limit
        with torch.inference_mode(False):  # gradients may be computed with them
            if has_room(device, count * dtype.itemsize):
                values = torch.empty(count, dtype=dtype, device=device)
            elif count * dtype.itemsize > most:
                values = mapped(count, dtype)
            else:
                values = torch.empty(count, dtype=dtype, pin_memory=pinned)
        self.values = values.view(samples, length, width)
        self.ahead = CopiesAhead(self.values, device) if self.values.is_pinned() else None

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

    def read(self, part: slice) -> Tensor:
        """Some samples, on the device that they were made for."""
        return self.ahead.take(part) if self.ahead else self.values[part].to(self.device)

    def __setitem__(self, part: slice, x: Tensor) -> None:
        if self.ahead:
            self.ahead.forget(part)
        self.values[part].copy_(x.to(self.values.dtype))  # straight into pages that cannot move, if these are some


class CopiesAhead:
    """Copies samples from pinned memory to a CUDA device, those behind while those that were asked for are at work.

    Args:
        values: [S, ...], pinned.
        device: where they go.
    """

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self.values, self.device = values, device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.begun: tuple[slice, Tensor] | None = None
        self.taken: list[torch.cuda.Event] = []
        """Where the device was when parts were asked for; copies that wait for it to be done would fill its memory."""

    def take(self, part: slice) -> Tensor:
        """Some samples; those of the next part, as long, are begun."""
        begun, here = self.begun, torch.cuda.current_stream(self.device)
        if len(self.taken) == AHEAD:
            self.taken.pop(0).synchronize()
        self.taken.append(here.record_event())
        if begun and begun[0] == part:
            x = begun[1]
            here.wait_stream(self.stream)
            x.record_stream(here)
        else:
            x = self.values[part].to(self.device, non_blocking=True)
        following = slice(part.stop, 2 * part.stop - part.start)
        self.begun = None
        if following.start < len(self.values):
            with torch.cuda.stream(self.stream):
                self.begun = following, self.values[following].to(self.device, non_blocking=True)
        return x

    def forget(self, part: slice) -> None:
        """Lets go of what was begun of samples that are written to."""
        if self.begun and self.begun[0].start < part.stop and part.start < self.begun[0].stop:
            self.begun = None


def device_memory(device: torch.device) -> int:
    """Bytes that this process may take on a CUDA device: all of it, or the part that PyTorch was told."""
    part = torch.cuda.get_per_process_memory_fraction(device.index) if hasattr(torch.cuda, LIMITED) else 1.0
    return int(torch.cuda.get_device_properties(device).total_memory * part)


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether so many bytes may stay on a CUDA device."""
    return device.type == "cuda" and nbytes * DEVICE_PART <= device_memory(device)


def waiting_limit(device: torch.device, trains: bool = False) -> int:
    """Bytes that the intermediates of all batches may take on a device while they wait for layers to be solved.

    Args:
        device: where they wait.
        trains: whether the block is trained when its layers are solved.
    """
    if device.type != "cuda":
        return MEMORY_LIMIT
    return device_memory(device) // (BESIDE_PART if trains else WAITING_PART)


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
