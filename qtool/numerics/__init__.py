"""Kernels, and what they are built on.

Compiled ones are kept beside their sources, in the user's cache, or where $NUMBA_CACHE_DIR says. Where none of these
can be written, as in containers that run under another user than installed them, numba refuses to import a kernel at
all: a temporary folder that is this user's alone takes their place.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

KEPT = Path(__file__).with_name("__pycache__")


def private_folder() -> Path:
    """A folder that nobody else can write, since what lies in it is run; if possible, the same one next time."""
    folder = Path(tempfile.gettempdir()) / f"qtool-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="qtool-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def keep_kernels() -> None:
    """Sees to it that kernels can be kept somewhere."""
    if os.access(KEPT if KEPT.exists() else KEPT.parent, os.W_OK | os.X_OK):
        return
    import numba  # takes long, and here it is rarely needed

    try:
        numba.njit(cache=True)(keep_kernels)
    except RuntimeError:  # no place that numba knows
        numba.config.CACHE_DIR = str(private_folder())


keep_kernels()
