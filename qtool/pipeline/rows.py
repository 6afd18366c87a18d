"""Large matrices in parts of whole rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

PART = 1 << 22
"""Numbers of a large matrix that are worked on at a time: 16 MiB in float32, and a few such temporaries."""


def row_parts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts in which a large matrix is worked on."""
    rows, step = shape[0], max(1, PART // math.prod(shape[1:]))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
