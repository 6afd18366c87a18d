"""What transforms of keys share: how large channels are, which they go by.

Shape letters: C channels of keys, K inputs.
"""

from __future__ import annotations

from torch import Tensor

from qtool.stats._base import Statistic
from qtool.stats.gram import Gram
from qtool.stats.means import Means
from qtool.transforms._base import Kind, Site, Transform


class OfKeys(Transform):
    """Changes keys, which queries make up for."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset({"scores"})

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What `energies` takes of the inputs of k."""
        return frozenset({Gram, Means})


def energies(site: Site) -> Tensor | None:
    """Mean squares of the channels of keys, float64 [C]; None: nothing was measured, or all are zero.

    They follow from rows of the weight, the Gram matrix of its inputs, their means, and the bias: keys themselves need
    not be seen.

        mean K_j^2 = w_j G w_j^T / tokens + 2 b_j (w_j . mean X) + b_j^2

    Args:
        site: of kind "scores".
    """
    if site.stats is None or not site.stats.tokens or site.source is None:
        return None
    w, gram = site.source().double(), site.measured(Gram).matrix.cpu().double()
    found = ((w @ gram) * w).sum(1).clamp_min(0) / site.stats.tokens
    if site.bias is not None:
        b = site.bias().double()
        found = (found + 2 * b * (w @ site.measured(Means).mean.cpu()) + b.square()).clamp_min(0)
    return found if bool(found.max() > 0) else None
