"""Spreads independent work over threads. Compiled kernels and torch release the interpreter lock, so threads scale.

Two pieces of work side by side, each on one core, take about half the time of one after the other on two cores each:
the products of a decoder block are too small to be split well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import groupby
from threading import Thread
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Pieces of work for each thread that may be begun before the result of the oldest is taken."""

FEW = 4
"""Most threads for pieces of work of a millisecond, half of which the interpreter takes, which runs one at a time."""

CPU = torch.device("cpu")


def shares(count: int, device: torch.device = CPU) -> tuple[int, int]:
    """(threads for `count` pieces of work, threads that torch may use in each); another device gets one at a time."""
    threads = torch.get_num_threads()
    used = max(1, min(threads, count)) if device.type == "cpu" else 1
    return used, threads // used


def lanes(used: int, each: int) -> list[ThreadPoolExecutor]:
    """Threads that do their work in order; torch computes with `each` threads on them."""
    return [ThreadPoolExecutor(1, "qtool", use_threads, (each,)) for _ in range(used)]


def use_threads(count: int) -> None:
    """Has torch compute with so many threads on this one."""
    torch.get_num_threads()  # a thread's first question overwrites what was set before it
    torch.set_num_threads(count)


kept_lanes = cache(lanes)
"""Lanes that wait for work; starting a thread takes longer than many a piece of work."""


def in_order(work: Iterable[tuple[ThreadPoolExecutor, Callable[[], Result]]], ahead: int) -> Iterator[Result]:
    """Results of some work, each on its lane, in order; at most `ahead` pieces are begun before the oldest is taken."""
    begun: list[Future[Result]] = []
    try:
        for lane, piece in work:
            begun.append(lane.submit(piece))
            if len(begun) >= ahead:
                yield begun.pop(0).result()
        while begun:
            yield begun.pop(0).result()
    finally:
        for future in begun:
            future.cancel()


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], among: tuple[int, int] | None = None
) -> list[Result]:
    """`[work(item) for item in items]`, on the threads that `shares` gives; by default on all that torch may use."""
    return list(one_by_one(work, items, among))


def one_by_one(
    work: Callable[[Item], Result], items: Sequence[Item], among: tuple[int, int] | None = None
) -> Iterator[Result]:
    """The same, each result as soon as it is there and those before it are taken."""
    used, each = among or shares(len(items))
    if used == 1:
        yield from map(work, items)
        return
    where = kept_lanes(used, each)
    pieces = ((where[i % used], lambda item=item: work(item)) for i, item in enumerate(items))
    yield from in_order(pieces, AHEAD * used)


def small_together(
    work: Callable[[Item], Result], items: Iterable[Item], small: Callable[[Item], bool]
) -> Iterator[Result]:
    """The same; small items, such as one expert's each, on a few threads, since threads gain little within one.

    Others have all threads, one after the other.
    """
    for together, some in groupby(items, small):
        yield from one_by_one(work, [*some], (min(FEW, torch.get_num_threads()), 1) if together else (1, 1))


def wake(device: torch.device) -> None:
    """Has a CUDA device begin on a thread: its context, and what libraries load before their first results."""

    def begin() -> None:
        with suppress(RuntimeError):  # whoever computes there meets it as well
            one = torch.eye(64, device=device)
            torch.linalg.cholesky_ex(one @ one)
            torch.mm(one.bfloat16(), one.bfloat16())

    if device.type == "cuda":
        Thread(target=begin, name="qtool").start()


def row_shares(rows: int, device: torch.device = CPU) -> list[tuple[int, int]]:
    """(start, stop) of about equally many rows for each thread; see `shares`."""
    used, _ = shares(rows, device)
    return [(rows * t // used, rows * (t + 1) // used) for t in range(used)]


def over_rows(work: Callable[[int, int], object], rows: int) -> None:
    """Calls `work(start, stop)` for parts of `range(rows)`, one part per thread that torch may use.

    The parts' sizes do not influence results as long as `work` treats rows independently.
    """
    here, *others = row_shares(rows)
    begun = [lane.submit(work, *part) for lane, part in zip(kept_lanes(len(others), 1), others, strict=True)]
    work(*here)  # on this thread, since waking another takes as long as many a part
    for part in begun:
        part.result()
