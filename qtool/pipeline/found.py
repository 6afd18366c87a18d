"""What was found for some rows of a module, and modules put together from what several processes found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qtool.formats._base import Quantized
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.ranks import Ranks
from qtool.pipeline.entries import Sums, solved_entry
from qtool.plan import LayerPlan
from qtool.report.model import LayerEntry
from qtool.residuals._base import Correction, Matrix
from qtool.stats._base import InputStats

FEW_CODES = 1 << 22
"""Codes up to which asking for pages that cannot move takes longer than they save."""


@dataclass(frozen=True)
class Found:
    """Some rows of a module, as one process solved them.

    Attributes:
        quantized: their codes and parameters.
        corrections: what is kept beside the codes of a whole matrix.
        sums: of their squares and errors.
        method: how codes were chosen.
        remarks: what was done otherwise than asked, and why.
        seconds: that they took.
    """

    quantized: Quantized
    corrections: tuple[Correction, ...]
    sums: Sums
    method: str
    remarks: tuple[str | None, ...]
    seconds: float

    def tensors(self) -> list[Tensor]:
        """All of them, in an order that `filled` knows."""
        of_corrections = (t for c in self.corrections for t in c.tensors.values())
        return [self.quantized.codes, *self.quantized.params.values(), *of_corrections]

    def filled(self, tensors: Iterator[Tensor]) -> Found:
        """The same with other tensors, taken in order."""
        codes = next(tensors)
        params = {name: next(tensors) for name in self.quantized.params}
        quantized = Quantized(codes, params, self.quantized.format)
        corrections = tuple(Correction(c.residual, {n: next(tensors) for n in c.tensors}) for c in self.corrections)
        return replace(self, quantized=quantized, corrections=corrections)


def rows_to_solve(plans: Sequence[LayerPlan], tied: Sequence[bool], ranks: Ranks) -> dict[str, tuple[int, int]]:
    """(start, stop) of the rows of some modules that this process solves: of all rows together, an even part.

    A part ends with a matrix where that is near: two halves of one take as long to walk as two matrices.

    Args:
        plans: of the modules.
        tied: whether the rows of each hang together, so that one process solves all of them.
        ranks: who solves the others.
    """
    edges = [0, *accumulate(p.module.shape[0] for p in plans)]
    start, stop = (near(edge, edges, ranks.size) for edge in ranks.part(edges[-1]))
    found, offset = {}, 0
    for p, together in zip(plans, tied, strict=True):
        rows = p.module.shape[0]
        if together:
            mine = start <= offset + rows // 2 < stop
            found[p.module.name] = (0, rows) if mine else (0, 0)
        else:
            found[p.module.name] = min(max(start - offset, 0), rows), min(max(stop - offset, 0), rows)
        offset += rows
    return found


def near(row: int, edges: Sequence[int], size: int) -> int:
    """The edge of a matrix that is near a row, if no process gets more than a third more for it; else the row."""
    edge = min(edges, key=lambda e: abs(e - row))
    room = edges[-1] / size / (3 if size == 2 else 6)  # parts in the middle have two ends
    return edge if abs(edge - row) <= room else row


def exchanged(found: Mapping[str, Found], ranks: Ranks, device: torch.device) -> dict[str, list[Found]]:
    """What all processes found, by module, in the order of rows.

    Args:
        found: what this one did.
        ranks: all of them.
        device: where tensors come from.
    """
    if ranks.size == 1:
        return {name: [rows] for name, rows in found.items()}
    bare = {name: rows.filled(iter([torch.empty(0)] * len(rows.tensors()))) for name, rows in found.items()}
    everything: dict[str, list[Found]] = {}
    for there, tensors in ranks.gather_tensors(bare, [t for rows in found.values() for t in rows.tensors()], device):
        arrived = iter(tensors)
        for name, rows in there.items():
            everything.setdefault(name, []).append(rows.filled(arrived))
    return everything


def assembled(plan: LayerPlan, stats: InputStats | None, parts: Sequence[Found]) -> tuple[Matrix, LayerEntry]:
    """A module and what the report says about it.

    Args:
        plan: of the module.
        stats: of its input; None without data.
        parts: all of its rows, in order.
    """
    with marked("codes copied"):
        quantized = together([part.quantized for part in parts])
    corrections = tuple(
        Correction(c.residual, {name: t.cpu() for name, t in c.tensors.items()}) for c in parts[0].corrections
    )
    sums = sum((part.sums for part in parts), Sums())
    remarks = [remark for part in parts for remark in part.remarks]
    entry = solved_entry(plan, parts[0].method, stats, sums, remarks, max(part.seconds for part in parts))
    return Matrix(quantized, corrections), entry


def together(parts: Sequence[Quantized]) -> Quantized:
    """Rows that follow each other, in memory; where a device copies to and from, in pages that cannot move."""
    first = parts[0]
    if len(parts) == 1 and first.codes.device.type == "cpu":
        return first
    shape = (sum(len(part.codes) for part in parts), first.codes.shape[1])
    pinned = first.codes.is_cuda and math.prod(shape) > FEW_CODES
    codes, start = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned), 0
    for part in parts:
        codes[start : start + len(part.codes)] = part.codes
        start += len(part.codes)
    params = {name: torch.cat([part.params[name] for part in parts]).cpu() for name in first.params}
    return Quantized(codes, params, first.format)
