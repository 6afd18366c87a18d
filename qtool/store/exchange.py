"""Giving a folder its final name while an older one has it: at every moment one of the two stands there, or is found.

Linux swaps two names in one step (renameat2 with RENAME_EXCHANGE, https://man7.org/linux/man-pages/man2/rename.2.html).
Where the file system or the C library cannot, the older folder is set aside under a name that `recover` knows.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from errno import EINVAL, ENOSYS, ENOTSUP
from pathlib import Path

ASIDE = ".superseded.partial"
"""What the name of a folder ends in that was set aside."""
FROM_HERE, EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE."""


def replace_folder(new: Path, out: Path) -> None:
    """Gives `new` the name `out`; what `out` held, if anything, is removed afterwards. Raises OSError."""
    if not out.exists() or not any(out.iterdir()):
        new.replace(out)
    elif exchange(new, out):
        shutil.rmtree(new, ignore_errors=True)
    else:
        aside = aside_of(out)
        out.replace(aside)
        new.replace(out)
        shutil.rmtree(aside, ignore_errors=True)


def recover(out: Path) -> None:
    """Brings back what a killed process had set aside, or removes it if its successor stands. Raises OSError."""
    aside = aside_of(out)
    if not aside.is_dir():
        return
    if os.path.lexists(out):
        shutil.rmtree(aside)
    else:
        aside.replace(out)


def aside_of(out: Path) -> Path:
    """Where `out` is set aside."""
    return out.with_name(f".{out.name}{ASIDE}")


def exchange(a: Path, b: Path) -> bool:
    """Swaps the names of two folders in one step. False: that is not to be had here. Raises OSError."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    sys.audit("qtool.exchange", str(a), str(b))
    if swap(FROM_HERE, os.fsencode(a), FROM_HERE, os.fsencode(b), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (EINVAL, ENOSYS, ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))
