"""Notices when kernels are compiled, which happens once for each processor and release and takes longer than most work.

Source of the events: https://numba.readthedocs.io/en/stable/developer/event_api.html
"""

from __future__ import annotations

import time
from collections.abc import Callable

from numba.core import event


class Compiling(event.Listener):  # type: ignore[misc]
    """Counts the time that compilation takes; what is loaded from the cache is not compiled.

    Args:
        begun: called when a compilation begins, by whichever thread needs the kernel.
    """

    def __init__(self, begun: Callable[[], None]) -> None:
        self.begun = begun
        self.depth, self.began, self.before = 0, 0.0, 0.0
        event.register("numba:compile", self)

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + (time.monotonic() - self.began if self.depth else 0.0)

    def on_start(self, _: event.Event) -> None:
        """A kernel, or one that another needs; numba compiles one at a time."""
        if not self.depth:
            self.began = time.monotonic()
            self.begun()
        self.depth += 1

    def on_end(self, _: event.Event) -> None:
        """It is done."""
        self.depth -= 1
        if not self.depth:
            self.before += time.monotonic() - self.began

    def close(self) -> None:
        """Ends the listening."""
        event.unregister("numba:compile", self)
