"""Spreads row-independent work over threads. Compiled kernels release the interpreter lock, so plain threads scale."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch


def over_rows(work: Callable[[int, int], object], rows: int) -> None:
    """Calls `work(start, stop)` for parts of `range(rows)`, one part per thread that torch may use.

    The parts' sizes do not influence results as long as `work` treats rows independently.
    """
    threads = max(1, min(torch.get_num_threads(), rows))
    bounds = [rows * t // threads for t in range(threads + 1)]
    others = [pool(threads - 1).submit(work, *part) for part in pairwise(bounds[1:])]
    work(0, bounds[1])  # the first part here, since waking a thread takes as long as many a part
    for part in others:
        part.result()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work; starting them anew would take longer than many a piece of work."""
    return ThreadPoolExecutor(threads)
