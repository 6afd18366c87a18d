"""Saves what is solved while the next units are being solved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from typing_extensions import Self

from qtool.numerics.threads.marks import marked

Stored = TypeVar("Stored")

LANES = 3
"""Units that are stored at a time where another device computes: hashing and writing takes longer than solving."""


class Saving:
    """Stores units, several at a time on threads where another device computes, else at once, and enters them in order.

    Leaving the context waits for what was begun. What a save raises is raised by a later one, or on leaving.

    Args:
        device: where units are solved.
    """

    def __init__(self, device: torch.device) -> None:
        beside = device.type != "cpu"
        self.lanes = ThreadPoolExecutor(LANES, "qtool") if beside else None
        self.order = ThreadPoolExecutor(1, "qtool") if beside else None
        self.begun = deque[Future[None]]()

    def __call__(self, store: Callable[[], Stored], enter: Callable[[Stored], None]) -> None:
        """Saves a unit: stores it, and enters what that returns behind the unit before."""

        def work() -> Stored:
            with marked("saving"):
                return store()

        if self.lanes is None or self.order is None:
            enter(work())
            return
        while len(self.begun) >= LANES:
            self.begun.popleft().result()
        stored, before = self.lanes.submit(work), self.begun[-1] if self.begun else None

        def finish() -> None:
            if before:
                before.result()  # or nothing behind a unit that was not saved counts
            enter(stored.result())

        self.begun.append(self.order.submit(finish))

    def wait(self) -> None:
        """Returns when everything is saved."""
        while self.begun:
            self.begun.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for threads in (self.lanes, self.order):
            if threads:
                threads.shutdown()
        if kind is None:
            self.wait()
