"""Runs a program and measures it as the operating system sees it: wall time and peak resident memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """What a process cost: seconds of wall time, bytes of resident memory at its peak."""

    seconds: float
    peak_bytes: int


def measure(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        log: gets its stdout and stderr.
        environment: variables on top of ours.

    Raises:
        SystemExit: the command failed; the message names the log.
    """
    start = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"exit code {code}: {' '.join(map(str, command))}\nsee {log}")
    return Cost(seconds, usage.ru_maxrss * 1024)
