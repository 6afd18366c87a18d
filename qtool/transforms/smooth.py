"""SmoothQuant: part of the range of inputs is moved into the weights that read them.

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)

Inputs are divided by s, columns of all readers are multiplied with it. At the inputs of o and down, s is taken from the
rows of v and up instead of from a norm. https://arxiv.org/abs/2211.10438

Shape letters: C channels.
"""

from __future__ import annotations

from pydantic import Field

from qtool.ops.scale import Scale
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import EdgeTransform, Site, floored


class Smooth(EdgeTransform):
    """Scale migration.

    Attributes:
        alpha: 0 evens out the weights, 1 the inputs.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges of channels."""
        return frozenset({Channels})

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if site.idle:
            return None
        inputs, weights = floored(site.input_range()), floored(site.weight_range())
        if not bool(((inputs > 0) & (weights > 0)).all()):
            return None
        factors = inputs.double() ** self.alpha / weights.double() ** (1 - self.alpha)
        return Scale((factors / factors.log().mean().exp()).float())
