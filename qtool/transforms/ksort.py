"""Sorts the channels of keys, the largest first, so that groups of a rounded KV cache have channels of like size.

A group shares an exponent or a scale, which its largest number sets. Rows of q take the order of those of k, and
products stay what they were. Where positions turn channels, i with i + D / 2, the angle belongs to the place, so pairs
stay where they are; the larger channel of a pair comes first, with the sign that makes a quarter turn of the exchange:
a turn that comes before or behind those of positions alike. K-sort, https://arxiv.org/abs/2403.20137, whose runtime
has angles in another order as well.

Shape letters: C channels of keys, D channels of a head, A heads, R of D channels are turned by positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.ops.orthogonal import Orthogonal
from qtool.transforms._base import Site
from qtool.transforms._keys import OfKeys, energies


class KSort(OfKeys):
    """Order of the channels of keys."""

    def op(self, site: Site) -> Orthogonal | None:
        """See `Transform.op`."""
        if (size := energies(site)) is None:
            return None
        heads = size.view(-1, site.dim)
        return Orthogonal(torch.stack([sorting(own, site.rotary) for own in heads]))


def sorting(size: Tensor, rotary: int) -> Tensor:
    """The matrix that sorts what positions leave free to be sorted, [D] -> float32 [D, D]: channels are x times it."""
    half, rest = rotary // 2, torch.arange(rotary, len(size))
    first, second = torch.arange(half), torch.arange(half, rotary)
    later = size[second] > size[first]
    order = torch.cat(
        [
            torch.where(later, second, first),
            torch.where(later, first, second),
            rest[size[rest].argsort(descending=True, stable=True)],
        ]
    )
    signs = torch.ones(len(size))
    signs[second] = torch.where(later, -1.0, 1.0)
    return torch.eye(len(size))[:, order] * signs
