"""Resident memory of the process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATM = Path("/proc/self/statm")
STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Peak resident memory of the process so far, bytes."""
    _, found, rest = (STATUS.read_text() if STATUS.exists() else "").partition("VmHWM:")
    if found:  # preferred, because getrusage also counts the process that started this one
        return int(rest.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def resident_bytes() -> int:
    """Resident memory now, bytes; the peak where the system does not tell."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()
