"""SmoothQuant: part of the range of inputs is moved into the weights that read them.

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)

Inputs are divided by s, columns of all readers are multiplied with it. At the inputs of o and down, s is taken from the
rows of v and up instead of from a norm. https://arxiv.org/abs/2211.10438

Shape letters: C channels.
"""

from __future__ import annotations

import torch
from pydantic import Field

from qtool.ops.scale import Scale
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import SCALABLE, Kind, Site, Transform

LEAST = 1e-3
"""Ranges below this, relative to the largest, count as this, so that silent channels do not get wild factors."""


class Smooth(Transform):
    """Scale migration.

    Attributes:
        alpha: 0 evens out the weights, 1 the inputs.
        edges: where.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)
    edges: tuple[Kind, ...] = SCALABLE

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset(self.edges)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges of channels."""
        return frozenset({Channels})

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        assert site.stats is not None
        if not site.stats.tokens or not site.readers:
            return None
        inputs = site.largest(site.stats[Channels].absmax.cpu())
        weights = torch.stack([site.largest(r.weight().abs().amax(0)) for r in site.readers]).amax(0)
        inputs, weights = (x.clamp_min(float(x.max()) * LEAST) for x in (inputs, weights))
        if not bool(((inputs > 0) & (weights > 0)).all()):
            return None
        factors = inputs.double() ** self.alpha / weights.double() ** (1 - self.alpha)
        return Scale((factors / factors.log().mean().exp()).float())
