"""Formats whose scales come from the largest weight alone: fitting and rounding a matrix, against copying it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from qtool.formats._spelling import parse_format

FORMATS: tuple[dict[str, object] | str, ...] = (
    {"type": "fp", "element": "e4m3", "group": "channel", "scales": "minmax"},
    {"type": "fp", "element": "e4m3", "group": "tensor", "scales": "minmax"},
    {"type": "int", "bits": 8, "group": "channel", "scales": "minmax"},
    "mxfp8-floor",
    "mxint8-floor",
    "mxfp4-floor",
    "q8_0-ggml",
)
ROWS, COLUMNS = 4096, 4096


def casts() -> Iterator[tuple[str, float, float]]:
    """(format, seconds, seconds of a copy into new memory) for a matrix of random numbers in float32."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    copy = best(w.clone)
    for value in FORMATS:
        fmt = parse_format(value)
        yield fmt.label, best(lambda fmt=fmt: fmt.snap(w, fmt.fit(w))), copy


def best(work: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the quickest of some calls, after one that compiles."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
