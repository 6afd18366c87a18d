"""Processes that do one run together, each a share of it: torch.distributed, and nothing else.

A process that is alone goes the same way; nothing is sent then. Every process has to make the same calls in the same
order, so what is skipped on one has to be skipped on all.

Tensors go by the backend of their device (NCCL on CUDA, else gloo), objects always by gloo. Each exchange of tensors
comes behind one of objects, which notices at once that a process is gone; NCCL would wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qtool.errors import ProcessError

Item = TypeVar("Item")

PATIENCE = timedelta(hours=2)
"""How long to wait for others before giving up: longer than what one process does alone, writing large artifacts for
example. Processes that end are noticed much earlier."""
ALIGNED = 16
"""Tensors that are sent together begin at multiples of so many bytes."""


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        rank: which one this is, from 0.
        size: how many there are.
        store: what all of them can read and write without each other; None for one that is alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store

    @property
    def first(self) -> bool:
        """True for the process that writes files and reports progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` items are this process's: every `size`-th, so that any first few are shared out as well."""
        return slice(self.rank, count, self.size)

    def part(self, count: int) -> tuple[int, int]:
        """(start, stop) of this process's items, where those of a process are to follow each other."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def gather(self, item: Item) -> list[Item]:
        """What every process gave, by rank. Raises ProcessError, as all that follow do."""
        if self.size == 1:
            return [item]
        found: list[Any] = [None] * self.size
        with self._reached():
            dist.all_gather_object(found, item)
        return found

    def broadcast(self, item: Item) -> Item:
        """What the first process gave."""
        if self.size == 1:
            return item
        items: list[Any] = [item if self.first else None]
        with self._reached():
            dist.broadcast_object_list(items, src=0)
        result: Item = items[0]
        return result

    def minimum(self, number: int) -> int:
        """The smallest of what every process gave."""
        return min(self.gather(number))

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.gather(None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by the sum over all processes, of which each gets the same bits."""
        if self.size > 1:
            with self._reached():
                dist.all_reduce(tensor)
        return tensor

    def hand(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of one process in all of them, row by row in memory.

        Args:
            tensor: there what is handed over; elsewhere one of the same shape and type, which is written over.
            source: rank of the process that has it.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with self._reached():
            dist.broadcast(tensor, src=source)
        return tensor

    def gather_tensors(
        self, item: Item, tensors: Sequence[Tensor], device: torch.device
    ) -> list[tuple[Item, list[Tensor]]]:
        """What every process gave, by rank: an object, and tensors of any number, shapes and types, bit for bit.

        Args:
            item: an object.
            tensors: on any device.
            device: where tensors are sent from, and arrive.
        """
        if self.size == 1:
            return [(item, list(tensors))]
        headers = self.gather((item, [(t.dtype, tuple(t.shape)) for t in tensors]))
        mine = packed(tensors, device, max(layout(likes)[1] for _, likes in headers))
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._reached():
            dist.all_gather(found, mine)
        return [(item, unpacked(data, likes)) for data, (item, likes) in zip(found, headers, strict=True)]

    def ended(self) -> bool:
        """Tells the others that this process ends with an error; True if it is the one to say why."""
        if self.size == 1:
            return True
        with suppress(RuntimeError):  # whoever kept the store is gone as well
            return bool(self._store.add("ended", 1) == 1)
        return True

    def close(self) -> None:
        """Ends the exchange, when all is done."""
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turns what torch says of processes that are gone into one line. Raises ProcessError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            what = f"process {self.rank} of {self.size} cannot reach the others, at least one of which has ended"
            raise ProcessError(what, hint="run the same command again to continue") from error


ALONE = Ranks()


def join(rank: int, size: int) -> Ranks:
    """Meets the other processes, at the address that torchrun put into the environment of all.

    Args:
        rank: of this one.
        size: how many there are.

    Raises:
        ProcessError: they are not there.
    """
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessError("processes do not find each other", wanted="torchrun to start them", found=error) from error
    ranks = Ranks(rank, size, PrefixStore("qtool", store))
    ranks.barrier()  # one that goes on and ends would have others ended here, where nobody knows of it
    return ranks


Like = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


def packed(tensors: Sequence[Tensor], device: torch.device, length: int = 0) -> Tensor:
    """Tensors of any types and shapes as one row of bytes, uint8 [at least `length`], on a device."""
    flat = [t.detach().contiguous().view(-1).view(torch.uint8).to(device) for t in tensors]
    room = torch.zeros(ALIGNED, dtype=torch.uint8, device=device)
    parts = [part for t in flat for part in (t, room[: -len(t) % ALIGNED]) if len(part)]
    rest = max(0, length - sum(map(len, parts)))
    return torch.cat([*parts, torch.zeros(rest, dtype=torch.uint8, device=device)])


def unpacked(data: Tensor, likes: Sequence[Like]) -> list[Tensor]:
    """The tensors of a row of bytes, which they share: those that were `packed`, of these types and shapes."""
    return [view_at(data, start, *like) for start, like in zip(layout(likes)[0], likes, strict=True)]


def layout(likes: Sequence[Like]) -> tuple[list[int], int]:
    """(where tensors of these types and shapes begin in a row of bytes, where the row ends)."""
    starts, end = [], 0
    for dtype, shape in likes:
        starts.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
    return starts, end


def view_at(data: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor that begins somewhere in a row of bytes."""
    return data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
