"""Saves what is solved while the next unit is being solved."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from typing_extensions import Self

from qtool.numerics.threads.marks import marked


class Saving:
    """Saves one unit at a time: on a thread where another device computes, else at once.

    Leaving the context waits for what was begun. What a save raises is raised by the next one, or on leaving.

    Args:
        device: where units are solved.
    """

    def __init__(self, device: torch.device) -> None:
        self.lane = ThreadPoolExecutor(1, "qtool") if device.type != "cpu" else None
        self.begun: Future[None] | None = None

    def __call__(self, save: Callable[[], None]) -> None:
        """Saves a unit, after the one before."""

        def work() -> None:
            with marked("saving"):
                save()

        if self.lane is None:
            work()
            return
        self.wait()
        self.begun = self.lane.submit(work)

    def wait(self) -> None:
        """Returns when everything is saved."""
        begun, self.begun = self.begun, None
        if begun:
            begun.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.lane:
            self.lane.shutdown()
        if kind is None:
            self.wait()
