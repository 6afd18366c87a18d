"""Of processes that test side by side, one compiles a kernel; the others wait for it, and load what it stored."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any
from zlib import crc32

from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher


def compile_once() -> None:
    """Has processes wait for each other's kernels: a byte of a file stands for a kernel and a place where it is kept.

    The compiler's own lock is taken first: whoever has a kernel's byte waits for no other thread of its process, and
    for other processes only in the order in which kernels call each other.
    """
    plain, file = Dispatcher.compile, Path(__file__).with_name("__pycache__") / "kernels.lock"
    file.parent.mkdir(exist_ok=True)
    locks = os.open(file, os.O_RDWR | os.O_CREAT)

    def compile_alone(self: Dispatcher, sig: Any) -> Any:
        if not self._cache.cache_path:
            return plain(self, sig)
        at = crc32(f"{self._cache.cache_path} {self.py_func.__qualname__}".encode())
        with global_compiler_lock:
            fcntl.lockf(locks, fcntl.LOCK_EX, 1, at)
            try:
                return plain(self, sig)
            finally:
                fcntl.lockf(locks, fcntl.LOCK_UN, 1, at)

    Dispatcher.compile = compile_alone
