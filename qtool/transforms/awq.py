"""AWQ: channels with large inputs are scaled up before rounding, by the power of their size that leaves least error.

    s_j = rms(X_j)^a  or  rms(X_j)^a / rms(W_:,j)^(1 - a),  a from 0 to 1 in steps
    least  sum over readers of  tr(E G E^T),  E = round(W s) / s - W

G is the Gram matrix of the inputs, so outputs are compared in closed form and nothing is run again. What is compared
are up to `ROWS` rows of each reader, spread evenly. The second family, which also evens out weights, is that of
https://github.com/casper-hansen/AutoAWQ. Weights are clipped as far as the format's search for scales clips.
https://arxiv.org/abs/2306.00978

Shape letters: C channels, n rows, K columns.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qtool.ops.scale import Scale
from qtool.stats._base import Statistic
from qtool.stats.gram import Gram
from qtool.transforms._base import FactorTransform, Reader, Site, floored

ROWS = 128
"""Rows of a reader that errors are compared on: powers differ by much more than what is left to chance."""
LEAST = 1e-4
"""Channels smaller than this, relative to the largest, count as so large."""


class AWQ(FactorTransform):
    """Activation-aware scaling.

    Attributes:
        steps: powers tried in each of both families, from 0 to less than 1.
    """

    steps: int = Field(default=10, ge=2)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Gram matrices."""
        return frozenset({Gram})

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if site.idle:
            return None
        gram = site.measured(Gram).matrix.cpu()
        size = site.mean(gram.diagonal().clamp_min(0)).double().sqrt()
        if not bool(size.max() > 0):
            return None
        size = floored(size, LEAST)
        weights = [(reader, some_rows(reader.weight())) for reader in site.readers]
        energy = torch.stack([w.double().square().sum(0) for _, w in weights]).sum(0)
        columns = floored(site.mean(energy).sqrt(), LEAST).clamp_min(1e-30)
        powers = [step / self.steps for step in range(self.steps)]
        tried = [size**a for a in powers] + [size**a / columns ** (1 - a) for a in powers]
        tried = [s / (s.max() * s.min()).sqrt() for s in tried]
        errors = [sum(error(r, w, gram, site.columns(s.float())) for r, w in weights) for s in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        return Scale(tried[best].float()) if best else None


def some_rows(w: Tensor) -> Tensor:
    """Up to `ROWS` rows of a matrix, spread evenly."""
    return w[torch.linspace(0, len(w) - 1, min(len(w), ROWS)).round().long()]


def error(reader: Reader, w: Tensor, gram: Tensor, factors: Tensor) -> float:
    """Squared error of the outputs of rounded rows, relative to the outputs.

    Args:
        reader: says how it is rounded.
        w: float32 [n, K].
        gram: of the inputs, [K, K].
        factors: that columns are multiplied with before, [K].
    """
    importance = gram.diagonal() / factors.square()
    apart = reader.rounded(w * factors, importance) / factors - w
    return float(((apart @ gram) * apart).sum().double())
