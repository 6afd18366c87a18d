"""Matrices in parts of whole rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

PART = 1 << 22
"""Numbers of a large matrix that are worked on at a time: 16 MiB in float32, and a few such temporaries."""
ON_DEVICE = 16
"""How many times as many a device works on at a time, which waits for the processor between parts."""

View = TypeVar("View")


def row_parts(shape: Sequence[int], times: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts in which a large matrix is worked on; a single number is one row.

    times: how many times as much as usual a part is.
    """
    rows, step = shape[0] if shape else 1, max(1, times * PART // max(math.prod(shape[1:]), 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def row_groups(
    rows: int, views: Sequence[View], first: int = 0, last: int | None = None
) -> Iterator[tuple[View, slice]]:
    """What counts for groups of rows, see `InputStats.of`: (its view, which of some rows belong to it).

    Args:
        rows: of the matrix.
        views: of its groups.
        first: of the rows that are at hand.
        last: behind them.
    """
    last = rows if last is None else last
    for b, view in enumerate(views):
        start, stop = max(rows * b // len(views), first), min(rows * (b + 1) // len(views), last)
        if start < stop:
            yield view, slice(start - first, stop - first)
