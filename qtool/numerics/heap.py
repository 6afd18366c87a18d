"""Memory that nobody uses any more, but that still counts as the process's own."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
DONTNEED = 4
"""MADV_DONTNEED of Linux."""
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)")
"""The line that begins a mapping of a file: its first address, the one behind its last, the path."""


def give_back() -> None:
    """Gives unused pages of the heap back to the system.

    glibc keeps them for later, a third of a GPTQ run's memory; without this, what comes next grows on top of it. Other
    C libraries have no such call.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def let_go_of_files(folder: Path) -> None:
    """Has pages of mapped files of a folder count as the process's own only when they are read again.

    Mappings that somebody wrote into are left as they are, since that would be lost. Nothing happens where the system
    does not tell them apart (Linux does).
    """
    with suppress(AttributeError, OSError, TypeError):
        advise, inside = ctypes.CDLL(None).madvise, f"{folder.resolve()}/"
        begin = end = 0
        for line in SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := MAPPING.fullmatch(line):
                begin, end = (int(x, 16) if found[3].startswith(inside) else 0 for x in found.groups()[:2])
            elif end and line.split() == ["Anonymous:", "0", "kB"]:  # else private copies of changed pages
                advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONTNEED)
