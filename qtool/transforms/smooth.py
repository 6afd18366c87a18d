"""SmoothQuant: part of the range of inputs is moved into the weights that read them.

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)

Inputs are divided by s, columns of all readers are multiplied with it. At the inputs of o and down, s is taken from the
rows of v and up instead of from a norm. https://arxiv.org/abs/2211.10438

Experts read the same channels as their router does, but not the same tokens: of `experts: largest` each has factors of
its own, from what comes to it, and the largest of them count, so that no expert's inputs are larger than it would have
them (EAQuant, https://arxiv.org/abs/2506.13329).

`alpha: 1` looks at inputs alone; then all channels have one range, and a scale for all tokens and channels of an input
is as good as one for each channel, which the norm or the layer before applies (OutlierTune,
https://arxiv.org/abs/2406.18832; RepQuant, https://arxiv.org/abs/2402.05628; MergeQuant's migration of steps,
https://arxiv.org/abs/2503.07654).

Shape letters: C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.ops.scale import Scale
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import FactorTransform, Reader, Site, floored


class Smooth(FactorTransform):
    """Scale migration.

    Attributes:
        alpha: 0 evens out the weights, 1 the inputs.
        experts: whether readers are looked at together, or each by itself and the largest factors count.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)
    experts: Literal["together", "largest"] = "together"

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges of channels."""
        return frozenset({Channels})

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if site.idle:
            return None
        if self.experts == "together":
            factors = self.factors(site.input_range(), site.weight_range())
        else:
            each = [self.of_reader(site, reader) for reader in site.readers if reader.stats and reader.stats.tokens]
            found = [own for own in each if own is not None]
            factors = torch.stack(found).amax(0) if found else None
        return None if factors is None else Scale((factors / factors.log().mean().exp()).float())

    def of_reader(self, site: Site, reader: Reader) -> Tensor | None:
        """Factors that a reader would have, float64 [C]."""
        assert reader.stats is not None
        inputs, weights = reader.stats[Channels].absmax.cpu(), reader.weight().abs().amax(0)
        return self.factors(site.largest(inputs), site.largest(weights))

    def factors(self, inputs: Tensor, weights: Tensor) -> Tensor | None:
        """Of ranges [C], float64 [C]; None where all inputs or weights are zero."""
        inputs, weights = floored(inputs), floored(weights)
        if not bool(((inputs > 0) & (weights > 0)).all()):
            return None
        return inputs.double() ** self.alpha / weights.double() ** (1 - self.alpha)
