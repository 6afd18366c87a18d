"""What the stages of a run cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qtool.numerics.heap import give_back
from qtool.pipeline.memory import peak_bytes
from qtool.report.model import StageEntry


class Stopwatch:
    """Time and memory of the stages of a run, in order.

    Args:
        earlier: a stage that was done before.

    Attributes:
        entries: one per finished stage.
    """

    def __init__(self, earlier: StageEntry | None = None) -> None:
        self.entries = [earlier] if earlier else []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what runs inside as a stage, and has the next one begin without what it leaves on the heap."""
        begin = time.monotonic()
        yield
        give_back()
        self.entries.append(StageEntry(name=name, seconds=time.monotonic() - begin, peak_bytes=peak_bytes()))
