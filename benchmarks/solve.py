"""What GPTQ takes in each format: a matrix of the demo model's size through the solver, against 4-bit integers.

One thread, processor time, so that other work on the machine hardly counts. Inputs are correlated, some channels are
much larger than others, and they have drifted as behind quantized layers. Settings are those of the recipes that ship.
What is timed is all that is done behind the Gram matrix: factor, drift, walk, refinement.

Shape letters: N rows, K columns, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.formats._spelling import parse_format
from qtool.methods._base import Method
from qtool.methods.gptq import GPTQ
from qtool.numerics.metrics import energy, ratio_db
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram

ROWS, COLUMNS, TOKENS = 576, 1536, 4096
FAMILIES = {
    "int4": ("int4-g128",),
    "microscaling": ("mxfp4", "nvfp4"),
    "k-quants": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    "i-quants": ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"),
}
"""The first one is what the others are compared with."""
METHODS = {"int4": GPTQ(rounds=0)}
"""Other settings than the usual ones, as the family's recipes have them."""
REPEATS = 3
HEADER = f"{'format':10} {'seconds':>8} {'over int4':>9} {'output dB':>9}"


class Line(NamedTuple):
    """Processor time of a matrix in a format, that over the time of 4-bit integers, and the error of outputs."""

    label: str
    seconds: float
    ratio: float
    decibels: float

    def __str__(self) -> str:
        return f"{self.label:10} {self.seconds:8.3f} {self.ratio:9.2f} {self.decibels:9.2f}"


def problem(rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, K], inputs and what they were before they drifted, [T, K]; float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing = 0.7 * normal(columns, columns) / columns**0.5 + torch.eye(columns)
    x = (normal(tokens, columns) @ mixing) * (0.7 * normal(columns)).exp()
    w = 0.03 * normal(rows, columns) * (0.5 * normal(rows, 1)).exp()
    return w, x, x + 0.05 * x.std() * normal(tokens, columns)


def solved(w: Tensor, x: Tensor, reference: Tensor, label: str, method: Method) -> tuple[float, float]:
    """(seconds of processor time, decibels of the outputs) of one format."""
    fmt = parse_format(label)
    fmt = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    stats = InputStats(x.shape[1], method.needs)
    stats.add(x, reference)
    times, decoded = [], w
    for _ in range(REPEATS + 1):  # the first one compiles
        stats.cache.clear()
        begin = time.process_time()
        method.prepare(stats, fmt)
        found = method.solve(w, stats, fmt).quantized
        times.append(time.process_time() - begin)
        decoded = found.decode()
    gram = stats[Gram].matrix
    return min(times), ratio_db(energy(w, gram), energy(w - decoded, gram))


def lines() -> Iterator[Line]:
    """Every format of `FAMILIES`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given, first = problem(ROWS, COLUMNS, TOKENS), None
        for family, labels in FAMILIES.items():
            for label in labels:
                seconds, decibels = solved(*given, label, METHODS.get(family, GPTQ()))
                first = first or seconds
                yield Line(label, seconds, seconds / first, decibels)
    finally:
        torch.set_num_threads(threads)
