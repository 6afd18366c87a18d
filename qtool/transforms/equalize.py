"""Evens out the ranges of channels between the layer that writes and the layer that reads them, without data.

    s_j = sqrt(max|V_j| / max|W_:,j|)

V are the rows that write, W the columns that read; afterwards both have the same range in every channel. Cross-layer
equalization of https://arxiv.org/abs/1906.04721, where rows of a matrix share a scale; free for o with v, and for down
with up.
"""

from __future__ import annotations

from qtool.ops.scale import Scale
from qtool.transforms._base import FactorTransform, Scalable, Site, floored


class Equalize(FactorTransform):
    """Cross-layer equalization.

    Attributes:
        edges: where.
    """

    edges: tuple[Scalable, ...] = ("heads", "product")

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if site.idle or site.source is None:
            return None
        writes, reads = floored(site.source().abs().amax(1)), floored(site.weight_range())
        if not bool(((writes > 0) & (reads > 0)).all()):
            return None
        return Scale((writes.double() / reads.double()).sqrt().float())
