"""Files and folders that one run writes at a time; the system drops a lock when the process ends in whatever way."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, ENOTSUP
from pathlib import Path

from qtool.errors import StorageError


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Holds an existing folder or file for this process; yields False on a file system without locks.

    Raises:
        StorageError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks no file that is only read
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another run is writing {path}", hint="wait for it, or choose another output") from None
        except OSError as error:
            if error.errno not in (ENOSYS, ENOTSUP, ENOLCK):
                raise
            held = False
        yield held
    finally:
        os.close(descriptor)
