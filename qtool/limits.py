"""How many cores and how much memory this process may have, which in a container is less than the machine has.

What Linux lets a container have is written in control groups (version 1 and 2): those of the process, as far as they
can be seen from inside, and all above them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MACHINE = Path("/proc/meminfo")


def cores() -> int:
    """Cores that may be used; the time of a part of one counts as one."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return math.ceil(min(quota(), len(affinity(0)) if affinity else os.cpu_count() or 1))


def quota() -> float:
    """Cores whose time may be used; infinite if nothing limits it."""
    found = [math.inf]
    for group in groups("cpu"):
        if time := numbers(group / "cpu.max"):
            found.append(time[0] / time[1])
        time, period = numbers(group / "cpu.cfs_quota_us"), numbers(group / "cpu.cfs_period_us")
        if time and period and time[0] > 0:  # -1: no limit
            found.append(time[0] / period[0])
    return min(found)


def free_memory() -> float:
    """Bytes that can be had without swapping and without being killed; infinite where the system does not say."""
    found = [math.inf]
    if MACHINE.exists():
        fields = dict(line.split(":", 1) for line in MACHINE.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in fields:
            found.append(1024.0 * int(fields["MemAvailable"].split()[0]))
    for group in groups("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            if (most := numbers(group / limit)) and (now := numbers(group / used)):
                found.append(max(0.0, most[0] - now[0] + counted(group / "memory.stat", cached)))
    return min(found)


def groups(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process that limit something, and of those above them.

    Args:
        controller: "cpu" or "memory".
    """
    for line in OWN.read_text(encoding="utf-8").splitlines() if OWN.exists() else []:
        number, names, own = line.split(":", 2)
        if number != "0" and controller not in names.split(","):
            continue
        root = GROUPS if number == "0" else GROUPS / names if (GROUPS / names).exists() else GROUPS / controller
        place = root / own.lstrip("/")
        yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(root))


def numbers(file: Path) -> list[float]:
    """The numbers in a file; none if it is not there, or says "max"."""
    try:
        return [float(word) for word in file.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []


def counted(file: Path, name: str) -> float:
    """A number in a file with a name and a number in each line; 0 if it is not there."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)
