"""Evens out the channels of keys, which queries make up for: for a KV cache whose tokens have one scale per head.

    s_j = rms(K_j)^alpha

A few channels of keys are many times as large as the others in every token. What the rotary embedding turns into each
other has the same factor, the root mean square of both. Sizes follow from the weight, statistics of its inputs, and
the bias: keys themselves need not be seen. SmoothAttention of QServe,
https://arxiv.org/abs/2405.04532, which takes the largest magnitudes instead.

Shape letters: C channels of keys, D channels of a head.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qtool.ops.scale import Scale
from qtool.transforms._base import Site, floored
from qtool.transforms._keys import OfKeys, energies


class Keys(OfKeys):
    """Smoothing of keys.

    Attributes:
        alpha: 0 leaves keys alone, 1 makes all channels alike.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)

    def op(self, site: Site) -> Scale | None:
        """See `Transform.op`."""
        if (found := energies(site)) is None:
            return None
        size = paired(found, site.dim, site.rotary).sqrt()
        heads = floored(size).view(-1, site.dim) ** self.alpha
        return Scale((heads / heads.log().mean(1, keepdim=True).exp()).flatten().float())


def paired(values: Tensor, dim: int, rotary: int) -> Tensor:
    """Means of both channels that are rotated into each other, [C] -> [C]; others stay."""
    heads, half = values.view(-1, dim).clone(), rotary // 2
    means = (heads[:, :half] + heads[:, half:rotary]) / 2
    heads[:, :rotary] = torch.cat((means, means), 1)
    return heads.flatten()
