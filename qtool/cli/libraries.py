"""What is told of other libraries: that they are newer than what was tried, and what they say themselves."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from qtool.tested import NEWEST


def major(release: str) -> int:
    """6 of "6.0.1"; 0 of what is no number."""
    first = release.partition(".")[0]
    return int(first) if first.isdecimal() else 0


def installed(name: str) -> str | None:
    """Version of a package; None: it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def untried() -> list[str]:
    """Installed libraries whose major version is newer than the tests know, each with what they know."""
    here = {name: found for name in NEWEST if (found := installed(name))}
    newer = [name for name, found in here.items() if major(found) > major(NEWEST[name])]
    return [f"{name} {here[name]} (tested up to {NEWEST[name]})" for name in newer]


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


def quiet_profiler() -> None:
    """Keeps torch's profiler from logging its own beginning and end; to be called before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above all that it has
