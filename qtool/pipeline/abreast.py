"""Modules of one shape whose inputs are measured at the same time, the experts of a block, solved side by side.

Shape letters: M inputs, N rows of the modules that read one of them, K columns.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint
from qtool.formats._base import Quantized
from qtool.methods._base import Method
from qtool.numerics.metrics import energies
from qtool.numerics.threads.marks import marked
from qtool.pipeline.entries import Sums
from qtool.pipeline.found import Found
from qtool.pipeline.requantize import origin
from qtool.pipeline.solve import tied
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats
from qtool.stats.gram import gram_of

ABREAST = 16
"""Most inputs at a time: enough to keep a device busy, few enough that their Gram matrices take little memory."""
MULTIPLE = 64
"""Of which the rows of all modules that read an input are one; see `Method.solve_abreast`."""

Readers = tuple[Sequence[LayerPlan], InputStats]
"""Modules that read an input, all of whose rows are solved here, and what was measured there."""


def solve_alike(
    inputs: Sequence[Readers], checkpoint: Checkpoint, weights: Mapping[str, Tensor], device: torch.device
) -> dict[str, Found]:
    """Solves those modules that have others like them, as far as their method does that; the rest is not named.

    Args:
        inputs: all of them.
        checkpoint: that they belong to.
        weights: [N, K] by name, on the device.
        device: where to compute.
    """
    if device.type != "cuda":
        return {}
    groups = defaultdict[object, list[Readers]](list)
    for plans, stats in inputs:
        if may(plans, stats, checkpoint, weights):
            groups[tuple((p.method, p.format, p.module.shape) for p in plans)].append((plans, stats))
    found: dict[str, Found] = {}
    for several in groups.values():
        for some in batches(several):
            found |= solve_batch(some, weights)
    return found


def batches(several: Sequence[Readers]) -> Iterator[Sequence[Readers]]:
    """At least two at a time."""
    count = -(-len(several) // ABREAST)
    for i in range(count):
        some = several[i * len(several) // count : (i + 1) * len(several) // count]
        if len(some) > 1:
            yield some


def may(plans: Sequence[LayerPlan], stats: InputStats, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> bool:
    """Whether the readers of an input can be solved beside those of others."""
    if sum(p.module.shape[0] for p in plans) % MULTIPLE or any(p.module.name not in weights for p in plans):
        return False
    method, fmt = plans[0].method, plans[0].format
    if method is None or fmt is None or not alike(plans, stats, checkpoint):
        return False
    return method.abreast(fmt, plans[0].module.shape[1])


def alike(plans: Sequence[LayerPlan], stats: InputStats, checkpoint: Checkpoint) -> bool:
    """Whether the readers of an input are solved alike, row by row, and are on no grid yet."""
    first = plans[0]
    if first.method is None or first.format is None or first.format.needs_largest:
        return False
    if first.method.first != first.method or any((p.method, p.format) != (first.method, first.format) for p in plans):
        return False
    if gram_of(stats) is None or any(tied(p) or stats.of(p.module.name) != (stats,) for p in plans):
        return False
    return all(origin(checkpoint, p.module.name, first.format).plain for p in plans)


def solve_batch(some: Sequence[Readers], weights: Mapping[str, Tensor]) -> dict[str, Found]:
    """Modules by name; none if they have to be solved one by one after all."""
    begin, names = time.monotonic(), [[p.module.name for p in plans] for plans, _ in some]
    first, statistics = some[0][0][0], [stats for _, stats in some]
    method, fmt = first.method, first.format
    assert method is not None
    assert fmt is not None
    w = torch.stack([torch.cat([weights[name] for name in readers]) for readers in names]).float()
    with marked("solving"):
        quantized = method.solve_abreast(w, statistics, fmt)
    if quantized is None:
        return {}
    with marked("errors"):
        sums = measured(w, quantized, torch.stack([stats_gram(stats) for stats in statistics]), some[0][0])
    if sums is None:
        return {}
    seconds = (time.monotonic() - begin) / sum(map(len, names))
    return dict(separated(some, quantized, sums, method, seconds))


def stats_gram(stats: InputStats) -> Tensor:
    """The Gram matrix, [K, K], that `may` has seen to be there."""
    gram = gram_of(stats)
    assert gram is not None
    return gram


def measured(w: Tensor, quantized: Quantized, grams: Tensor, plans: Sequence[LayerPlan]) -> list[list[Sums]] | None:
    """Squares by input and module, with one look at the device; None: some are not finite.

    Args:
        w: float32 [M, N, K].
        quantized: all rows.
        grams: float32 [M, K, K].
        plans: of the modules that read an input.
    """
    error, at, rows = w - quantized.decode().view_as(w), 0, []
    for p in plans:
        part = slice(at, at := at + p.module.shape[0])
        here, wrong = w[:, part], error[:, part]
        of_outputs = energies(here, grams), energies(wrong, grams)
        rows.append(torch.stack([energies(here), energies(wrong), *of_outputs, of_outputs[1]], 1))
    found = torch.stack(rows, 1)
    if not bool(found.isfinite().all()):
        return None
    return [[Sums(*numbers) for numbers in readers] for readers in found.tolist()]


def separated(
    some: Sequence[Readers], quantized: Quantized, sums: Sequence[Sequence[Sums]], method: Method, seconds: float
) -> Iterator[tuple[str, Found]]:
    """Module by module, in the order of rows."""
    at = 0
    for (plans, _), theirs in zip(some, sums, strict=True):
        for p, squares in zip(plans, theirs, strict=True):
            rows = quantized.rows(at, at := at + p.module.shape[0])
            yield p.module.name, Found(rows, (), squares, method.name(), (p.fallback,), seconds)
