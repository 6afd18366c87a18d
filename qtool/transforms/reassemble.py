"""Splits channels with outliers into several smaller ones, and merges pairs of other channels to keep the width.

    T_j = ceil(max|X_j| / theta) parts of channel j
    a pair (a, b) of channels becomes its mean:  |W_a - W_b|^2 |X_a - X_b|^2 / 4  is lost of the outputs

Tokens are rounded with steps in proportion to their largest channel, theta at most, so that the rounding of inputs
costs about (2 theta / 2^bits)^2 / 12 for each channel, times the squares of the weights that read it. What that and
merging cost is known in closed form from the Gram matrix for every theta; the least of all takes place. Pairs are of an
even and an odd channel that are not split, the cheapest first. QLLM, https://arxiv.org/abs/2310.08041, which runs
blocks for every theta instead, and trains what is lost back into the weights.

Shape letters: C channels, K columns, P pairs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qtool.ops.reassembly import Reassembly
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.stats.gram import Gram
from qtool.transforms._base import Kind, Site, Transform

THETAS = 100
"""Limits that are tried, from the largest channel down to a thirtieth of it."""


class Reassemble(Transform):
    """Channel disassembly and assembly, in front of layers.

    Attributes:
        most: channels that may be added, relative to all.
        bits: of rounded inputs.
    """

    most: float = Field(default=0.2, ge=0, le=0.5)
    bits: int = Field(default=4, ge=2, le=8)

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset({"input"})

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges, and what channels have in common."""
        return frozenset({Channels, Gram})

    def stays(self, width: int) -> Reassembly:
        """See `Transform.stays`."""
        return whole(width)

    def op(self, site: Site) -> Reassembly | None:
        """See `Transform.op`. It is there in front of all layers, whole where nothing is gained."""
        if site.idle:
            return None
        largest, gram = site.input_range().double(), site.measured(Gram).matrix.cpu().double()
        read = sum(
            (r.weight().double().T @ r.weight().double() for r in site.readers), torch.zeros((), dtype=gram.dtype)
        )
        assert site.stats is not None
        best, lost = whole(site.width), torch.inf
        reach, own = float(largest.max()), read.diagonal()
        if reach == 0:
            return best
        costs = distances(gram) * distances(read) / 4
        likely = cheapest(costs, most := int(self.most * site.width), site.width)
        for theta in (reach * torch.logspace(0, -5, THETAS, 2.0, dtype=torch.float64)).tolist():
            parts = (largest / theta).ceil().clamp_min(1).long()
            added = int(parts.sum()) - site.width
            pairs = disjoint(likely, parts == 1, added)
            if added > most or len(pairs) < added:
                break
            a, b = pairs.unbind(1)
            weights_squared = float(own @ parts.double()) + 2 * float(read[a, b].sum())
            step = 2 * theta / 2**self.bits
            left = float(costs[a, b].sum()) + step**2 / 12 * site.stats.tokens * weights_squared
            if left < lost:
                best, lost = assembled(parts, pairs), left
        return best


def whole(width: int) -> Reassembly:
    """Nothing is split and nothing merged."""
    return Reassembly(torch.arange(width), torch.arange(width), torch.full((width,), 0.5))


def distances(products: Tensor) -> Tensor:
    """Squared distances of vectors with these inner products, [C, C] -> [C, C]."""
    own = products.diagonal()
    return (own[:, None] + own - 2 * products).clamp_min(0)


def cheapest(costs: Tensor, count: int, width: int) -> Tensor:
    """Pairs of an even and an odd channel, the cheapest first, more than `count`: int64 [P, 2].

    Args:
        costs: [C, C].
        count: disjoint pairs that are wanted at most.
        width: C.
    """
    between = costs[0::2, 1::2]
    most = min(between.numel(), 64 * max(count, 1))
    at = between.flatten().topk(most, largest=False).indices
    odd = width // 2
    return torch.stack([2 * (at // odd), 2 * (at % odd) + 1], dim=1)


def disjoint(pairs: Tensor, free: Tensor, count: int) -> Tensor:
    """The first so many pairs of free channels, no channel twice: int64 [P, 2]."""
    found, taken = list[tuple[int, int]](), set[int]()
    for a, b in zip(*pairs[free[pairs].all(1)].T.tolist(), strict=True):
        if len(found) == count:
            break
        if a not in taken and b not in taken:
            found.append((a, b))
            taken |= {a, b}
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


def assembled(parts: Tensor, pairs: Tensor) -> Reassembly:
    """The operation: merged pairs stand where their first channel was, and parts where their second ones were."""
    first = torch.arange(len(parts))
    second, shares = first.clone(), 0.5 / parts.double()
    second[pairs[:, 0]] = pairs[:, 1]
    more = torch.repeat_interleave(parts - 1)
    first[pairs[:, 1]] = second[pairs[:, 1]] = more
    shares[pairs[:, 1]] = shares[more]
    return Reassembly(first, second, shares.float())
