"""What the C library keeps of memory that nobody uses any more."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Gives unused pages of the heap back to the system.

    glibc keeps them for later, a third of a GPTQ run's memory; without this, what comes next grows on top of it. Other
    C libraries have no such call.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
