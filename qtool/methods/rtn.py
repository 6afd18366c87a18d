"""Round to nearest: fit the format's parameters to the weights, snap.

`importance: true` weighs the fit's squared error with the mean square of each input channel, as llama.cpp does with its
importance matrix (https://github.com/ggml-org/llama.cpp/pull/4861); codes are nearest levels either way, and nearest
vectors by the same weights where a format has a codebook.
"""

from __future__ import annotations

from torch import Tensor

from qtool.formats._base import Format, Quantized
from qtool.methods._base import Method, Solution
from qtool.stats._base import InputStats, Statistic
from qtool.stats.channels import Channels


class RTN(Method):
    """Round to nearest."""

    importance: bool = False

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Channel sums for a weighted fit, else nothing."""
        return frozenset({Channels}) if self.importance else frozenset()

    def solve(self, w: Tensor, stats: InputStats | None, fmt: Format) -> Solution:
        """See `Method.solve`."""
        importance = stats[Channels].importance if stats and self.importance else None
        params = fmt.fit(w, importance)
        return Solution(Quantized(fmt.snap(w, params, importance), params, fmt))
