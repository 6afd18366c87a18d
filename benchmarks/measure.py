"""Runs a program and measures it as the operating system sees it: wall time and peak resident memory.

Linux counts the memory of whoever starts a program as that program's own peak, so `measure` starts this very file as a
small process in between, and that one starts the program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """What a process cost: seconds of wall time, bytes of resident memory at its peak."""

    seconds: float
    peak_bytes: int


def measure(command: Sequence[str | Path], log: Path) -> Cost:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        log: gets its stdout and stderr.

    Raises:
        SystemExit: the command failed; the message names the log.
    """
    between = subprocess.run([sys.executable, __file__, log, *command], check=True, capture_output=True, text=True)
    code, seconds, peak_bytes = json.loads(between.stdout)
    if code:
        raise SystemExit(f"exit code {code}: {' '.join(map(str, command))}\nsee {log}")
    return Cost(seconds, peak_bytes)


def main() -> None:
    """Runs the command in the arguments and prints [exit code, seconds, peak bytes]."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed was compiled once, and is not for every run
    start = time.perf_counter()
    with open(sys.argv[1], "wb") as sink:
        process = subprocess.Popen(sys.argv[2:], stdout=sink, stderr=sink)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024]))


if __name__ == "__main__":
    main()
