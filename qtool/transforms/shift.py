"""Channel-wise shifts: the middle of every channel's range is taken from it, and biases of the readers give it back.

    z_j = (max X_j + min X_j) / 2

A norm that has a bias writes X - z with another one, and so do values: attention's weights sum to 1, so what is taken
from the bias of v arrives at o. Readers have W z added to their biases (Outlier Suppression+,
https://arxiv.org/abs/2304.09145). Ranges become symmetric, where outliers of one sign cost scales half of their steps.
Models that have no such biases are refused; attention with sinks has weights that do not sum to 1.
"""

from __future__ import annotations

from typing import ClassVar

from qtool.ops.shift import Shift as Operation
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import Kind, Site, Transform


class Shift(Transform):
    """Shifts of channels behind norms and of values; before `smooth`, which then has less to migrate."""

    adds: ClassVar[bool] = True

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset({"norm", "heads"})

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges of channels."""
        return frozenset({Channels})

    def op(self, site: Site) -> Operation | None:
        """See `Transform.op`."""
        if site.idle:
            return None
        channels = site.measured(Channels)
        low, high = -site.largest(-channels.low.cpu()), site.largest(channels.high.cpu())
        return Operation((low + high) / 2)
