"""What is told of other libraries: that they are newer than what was tried, and what they say themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from qtool.tested import NEWEST


def major(release: str) -> int:
    """6 of "6.0.1"; 0 of what is no number."""
    first = release.partition(".")[0]
    return int(first) if first.isdecimal() else 0


def untried() -> list[str]:
    """Installed libraries whose major version is newer than the tests know, each with what they know."""
    found = []
    for name, tested in NEWEST.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if major(installed) > major(tested):
            found.append(f"{name} {installed} (tested up to {tested})")
    return found


@contextmanager
def silenced() -> Iterator[None]:
    """Within the context no library writes warnings or log lines below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
