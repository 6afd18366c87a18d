"""Which rows of a matrix stand for all of them: those that are likely to count more are more likely to be taken.

Systematic sampling with probability proportional to size, https://doi.org/10.1214/aoms/1177732062 (Hansen, Hurwitz): a
sum over all rows is estimated by that over the sample, each row divided by its probability. Where the values are
nearly proportional to the sizes, few rows say nearly everything. Nothing is drawn: the same sizes give the same rows.

Shape letters: N rows, M of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """Some rows.

    Attributes:
        rows: int64 [M], ascending.
        weights: float64 [M], how many rows each stands for: one over the probability that it is taken.
    """

    rows: Tensor
    weights: Tensor


def systematic(sizes: Tensor, count: int) -> Sample:
    """Rows that stand for all.

    Args:
        sizes: how much each row is likely to count, [N], none negative. Rows of size 0 are left out.
        count: rows that are wanted; all that count are taken if they are no more.
    """
    sizes = sizes.double().cpu()
    if int((sizes > 0).sum()) <= count:
        rows = (sizes > 0).nonzero()[:, 0]
        return Sample(rows, torch.ones(len(rows), dtype=torch.float64))
    certain = torch.zeros(len(sizes), dtype=torch.bool)
    while True:  # what is so large that it would be taken more than once is taken for certain
        left = sizes.masked_fill(certain, 0)
        chance = left * ((count - int(certain.sum())) / left.sum())
        if not (chance >= 1).any():
            break
        certain |= chance >= 1
    steps = chance.cumsum(0) + 0.5
    taken = steps.floor() > torch.cat([steps.new_tensor([0.5]), steps[:-1]]).floor()
    rows = (taken | certain).nonzero()[:, 0]
    return Sample(rows, torch.where(certain, 1.0, chance)[rows].reciprocal())
