"""Evens out the ranges of channels between the layer that writes and the layer that reads them, without data.

    s_j = sqrt(max|V_j| / max|W_:,j|)

V are the rows that write, W the columns that read; afterwards both have the same range in every channel. Cross-layer
equalization of https://arxiv.org/abs/1906.04721, where rows of a matrix share a scale; free for o with v, and for down
with up.
"""

from __future__ import annotations

import torch

from qtool.ops.scale import Scale
from qtool.transforms._base import Kind, Site, Transform

LEAST = 1e-3
"""Ranges below this, relative to the largest, count as this."""


class Equalize(Transform):
    """Cross-layer equalization.

    Attributes:
        edges: where.
    """

    edges: tuple[Kind, ...] = ("heads", "product")

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset(self.edges)

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if not site.readers or site.source is None:
            return None
        writes = site.source().abs().amax(1)
        reads = torch.stack([site.largest(r.weight().abs().amax(0)) for r in site.readers]).amax(0)
        if not bool(writes.max() > 0) or not bool(reads.max() > 0):
            return None
        writes, reads = (x.clamp_min(float(x.max()) * LEAST).double() for x in (writes, reads))
        return Scale((writes / reads).sqrt().float())
