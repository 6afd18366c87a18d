"""What was found for some rows of a module, and modules put together from what several processes found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.formats._base import Quantized
from qtool.numerics.threads.ranks import Ranks
from qtool.pipeline.entries import Sums, solved_entry
from qtool.plan import LayerPlan
from qtool.report.model import LayerEntry
from qtool.residuals._base import Correction, Matrix
from qtool.stats._base import InputStats


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

    Args:
        plans: of the modules.
        tied: whether the rows of each hang together, so that one process solves all of them.
        ranks: who solves the others.
    """
    start, stop = ranks.part(sum(p.module.shape[0] for p in plans))
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
    together: dict[str, list[Found]] = {}
    for there, tensors in ranks.gather(bare, [t for rows in found.values() for t in rows.tensors()], device):
        arrived = iter(tensors)
        for name, rows in there.items():
            together.setdefault(name, []).append(rows.filled(arrived))
    return together


def assembled(plan: LayerPlan, stats: InputStats | None, parts: Sequence[Found]) -> tuple[Matrix, LayerEntry]:
    """A module and what the report says about it.

    Args:
        plan: of the module.
        stats: of its input; None without data.
        parts: all of its rows, in order.
    """
    codes = torch.cat([part.quantized.codes.cpu() for part in parts])
    params = {
        name: torch.cat([part.quantized.params[name].cpu() for part in parts]) for name in parts[0].quantized.params
    }
    corrections = tuple(
        Correction(c.residual, {name: t.cpu() for name, t in c.tensors.items()}) for c in parts[0].corrections
    )
    sums = sum((part.sums for part in parts), Sums())
    remarks = [remark for part in parts for remark in part.remarks]
    entry = solved_entry(plan, parts[0].method, stats, sums, remarks, max(part.seconds for part in parts))
    return Matrix(Quantized(codes, params, parts[0].quantized.format), corrections), entry
