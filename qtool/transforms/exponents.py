"""Multiplies channels of inputs with powers of two, so that their largest numbers lie within one octave.

    s_j = 2^max(-octaves, round(log2(max|X_j| / max|X|)))

Minifloats of few exponent bits run out of octaves where channels differ in size; moved into the weights, whose own
exponents take them, the powers cost neither bits nor time, and nothing is rounded: norms and weights stay exact. The
pre-shifted exponent bias of LLM-FP4, https://arxiv.org/abs/2310.16836

Shape letters: C channels.
"""

from __future__ import annotations

from pydantic import Field

from qtool.ops.scale import Scale
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import FactorTransform, Site


class Exponents(FactorTransform):
    """Powers of two for channels.

    Attributes:
        octaves: the largest power; an exponent of E bits has room for 2^E - 1.
    """

    octaves: int = Field(default=3, ge=1, le=15)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges of channels."""
        return frozenset({Channels})

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if site.idle:
            return None
        inputs = site.input_range().double()
        if not bool(inputs.max() > 0):
            return None
        return Scale((inputs / inputs.max()).log2().round().clamp_min(-self.octaves).exp2().float())
