"""Matrices that are trained as one: those of a block with one format and as many columns, one below the other.

Whatever is trained belongs to weights, groups and rows, so values and gradients are those of each matrix alone; but a
device launches as many operations for all of them as for one, and small matrices take less time than launching does.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.formats._base import Quantized, alike
from qtool.methods._base import Solution
from qtool.methods._refine import join_rows
from qtool.methods._relaxed import Relaxed

SMALL = 1 << 22
"""Weights of a matrix that is not worth being alone; a larger one keeps a device busy, and a copy of it takes room."""


class TrainedRows:
    """Some matrices, and what is trained of them.

    Args:
        way: what is trained.
        weights: original ones by module, float32 [N, K] each, on the device.
        starts: where training begins, by module.
        scales: whether scales and free offsets move.
        generator: for what is drawn at random.

    Attributes:
        small: whether all of them take a device less time than launching what they are for.
    """

    def __init__(
        self,
        way: type[Relaxed],
        weights: Mapping[str, Tensor],
        starts: Mapping[str, Quantized],
        scales: bool,
        generator: torch.Generator,
    ) -> None:
        self.starts, self.rows = starts, [len(w) for w in weights.values()]
        self.small = all(w.numel() <= SMALL for w in weights.values())
        together, (first, *_) = list(weights.values()), starts.values()
        if len(together) == 1:
            self.relaxed = way(together[0], first, scales, generator)
            return
        codes, params = torch.cat([s.codes for s in starts.values()]), join_rows([s.params for s in starts.values()])
        self.relaxed = way(torch.cat(together), Quantized(codes, params, first.format), scales, generator)

    def weights(self, progress: float) -> dict[str, Tensor]:
        """See `Relaxed.weights`, by module."""
        return dict(zip(self.starts, torch.split(self.relaxed.weights(progress), self.rows), strict=True))

    def solutions(self) -> dict[str, Quantized]:
        """See `Relaxed.solution`, by module."""
        found, begin, apart = self.relaxed.solution(), 0, dict[str, Quantized]()
        for (name, start), rows in zip(self.starts.items(), self.rows, strict=True):
            own = found.rows(begin, begin + rows) if len(self.rows) > 1 else found
            apart[name], begin = Quantized(own.codes, own.params, start.format), begin + rows
        return apart


def joined(
    way: type[Relaxed],
    weights: Mapping[str, Tensor],
    found: Mapping[str, Solution],
    scales: bool,
    generator: torch.Generator,
) -> list[TrainedRows]:
    """All of some matrices, as few times as their formats and shapes allow; see `TrainedRows` for the arguments."""
    several: list[dict[str, Quantized]] = []
    for name, start in ((name, solution.quantized) for name, solution in found.items()):
        own = next((other for other in several if way.by_row and fit(start, next(iter(other.values())))), None)
        if own is None:
            several.append({name: start})
        else:
            own[name] = start
    return [TrainedRows(way, {name: weights[name] for name in own}, own, scales, generator) for own in several]


def fit(a: Quantized, b: Quantized) -> bool:
    """Whether rows of two matrices can be those of one: every parameter is some row's, and all rows are alike."""
    rowwise = all(len(p) == len(q.codes) for q in (a, b) for p in q.params.values())
    small = max(a.codes.numel(), b.codes.numel()) <= SMALL
    same = alike(a.format, b.format) and a.format.group_rows == 1 and a.codes.shape[1] == b.codes.shape[1]
    return small and same and rowwise
