"""Spreads row-independent work over threads. Compiled kernels release the interpreter lock, so plain threads scale."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def over_rows(work: Callable[[int, int], object], rows: int) -> None:
    """Calls `work(start, stop)` for parts of `range(rows)`, one part per thread that torch may use.

    The parts' sizes do not influence results as long as `work` treats rows independently.
    """
    threads = max(1, min(torch.get_num_threads(), rows))
    bounds = [rows * t // threads for t in range(threads + 1)]
    if threads == 1:
        work(0, rows)
        return
    list(pool(threads).map(work, bounds[:-1], bounds[1:]))


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work; starting them anew would take longer than many a piece of work."""
    return ThreadPoolExecutor(threads)
