"""What a run costs: time and resident memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.report.model import StageEntry

STATM = Path("/proc/self/statm")


def peak_bytes() -> int:
    """Peak resident memory of the process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def resident_bytes() -> int:
    """Resident memory now, bytes; the peak where the system does not tell."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


class Stopwatch:
    """Time and memory of the stages of a run, in order.

    Attributes:
        entries: one per finished stage.
    """

    def __init__(self) -> None:
        self.entries: list[StageEntry] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what runs inside as a stage."""
        begin = time.monotonic()
        yield
        self.entries.append(StageEntry(name=name, seconds=time.monotonic() - begin, peak_bytes=peak_bytes()))
