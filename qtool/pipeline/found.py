"""What was found for some rows of a module, and modules put together from what several processes found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat
from typing import TypeVar, cast

import torch
from torch import Tensor

from qtool.formats._base import Quantized
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.ranks import Ranks, packed, unpacked
from qtool.pipeline.entries import Sums, solved_entry
from qtool.plan import LayerPlan
from qtool.report.model import LayerEntry
from qtool.residuals._base import Correction, Matrix
from qtool.stats._base import InputStats

FEW_BYTES = 1 << 22
"""Bytes up to which asking for pages that cannot move takes longer than they save."""


AT_ONCE = 1 << 24
"""Numbers that are decoded at a time, of several small matrices."""

Key = TypeVar("Key", bound=Hashable)


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
    nothing = repeat(cast(Tensor, None))  # which is handed over in less time than a tensor without numbers
    bare = {name: rows.filled(nothing) for name, rows in found.items()}
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
    quantized = together([part.quantized for part in parts])
    corrections = tuple(
        Correction(c.residual, {name: t.cpu() for name, t in c.tensors.items()}) for c in parts[0].corrections
    )
    sums = sum((part.sums for part in parts), Sums())
    remarks = [remark for part in parts for remark in part.remarks]
    entry = solved_entry(plan, parts[0].method, stats, sums, remarks, max(part.seconds for part in parts))
    return Matrix(quantized, corrections), entry


def together(parts: Sequence[Quantized]) -> Quantized:
    """Rows that follow each other, on the device where they are."""
    first = parts[0]
    if len(parts) == 1:
        return first
    params = {name: torch.cat([part.params[name] for part in parts]) for name in first.params}
    return Quantized(torch.cat([part.codes for part in parts]), params, first.format)


def decoded(matrices: Mapping[Key, Matrix]) -> Iterator[tuple[Key, Tensor]]:
    """What matrices say, float32 [N, K], by the same keys; small ones that go by rows are decoded several at a time."""
    alike = defaultdict[object, list[Key]](list)
    for key, matrix in matrices.items():
        q = matrix.quantized
        rows = q.format.by_rows and all(p.shape[:1] == q.codes.shape[:1] for p in q.params.values())
        alone = matrix.residuals or not rows
        alike[key if alone else (q.format, q.codes.shape[1], *q.params)].append(key)
    for keys in alike.values():
        step = max(1, AT_ONCE // max(matrices[key].quantized.codes.numel() for key in keys))
        for some in (keys[a : a + step] for a in range(0, len(keys), step)):
            if len(some) == 1:
                yield some[0], matrices[some[0]].decode()
            else:
                parts = [matrices[key].quantized for key in some]
                w = torch.split(together(parts).decode(), [len(q.codes) for q in parts])
                yield from zip(some, w, strict=True)


def in_memory(matrices: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """The same matrices, by name; what is on a device goes over in one piece, into pages that cannot move if large."""
    found = {m: matrix.quantized for m, matrix in matrices.items()}
    far = [t for q in found.values() for t in (q.codes, *q.params.values()) if t.device.type != "cpu"]
    if not far:
        return dict(matrices)
    with marked("codes copied"):
        data = packed(far, far[0].device)
        there = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda and len(data) > FEW_BYTES)
        there.copy_(data)
    arrived = iter(unpacked(there, [(t.dtype, tuple(t.shape)) for t in far]))

    def near(tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type == "cpu" else next(arrived)

    return {
        m: replace(matrices[m], quantized=Quantized(near(q.codes), {n: near(p) for n, p in q.params.items()}, q.format))
        for m, q in found.items()
    }
