"""Rotations that are folded away: of hidden states (R1), and of each head's values (R2).

Outliers of single channels are spread over all of them. Weights of norms are folded into their readers first, and the
output layer gets a matrix of its own where it shared the embedding's.
QuaRot, https://arxiv.org/abs/2404.00456; SpinQuant, https://arxiv.org/abs/2405.16406
"""

from __future__ import annotations

from typing import Literal

import torch

from qtool.numerics.hadamard import known_order
from qtool.ops._base import InputOp
from qtool.ops.hadamard import Hadamard
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.permutation import Permutation
from qtool.transforms._base import EdgeTransform, Kind, Site


class Rotate(EdgeTransform):
    """Orthogonal matrices without a trace at run time.

    Attributes:
        matrix: "hadamard", with random signs, or "random", which any size has; "permutation" only puts channels into
            another order, by chance, so that others share groups: what a rotation has to be better than.
        edges: "stream" for hidden states, "heads" for values.
    """

    matrix: Literal["hadamard", "random", "permutation"] = "hadamard"
    edges: tuple[Literal["stream", "heads"], ...] = ("stream", "heads")

    def misfit(self, kind: Kind, width: int, dim: int) -> str | None:
        """See `Transform.misfit`."""
        if self.matrix != "hadamard" or known_order(dim):
            return None
        return f"no Hadamard matrix of order {dim} is known here; use matrix: random"

    def op(self, site: Site) -> InputOp:
        """See `Transform.op`."""
        generator = site.generator()
        if self.matrix == "hadamard":
            signs = torch.randint(0, 2, (site.width,), generator=generator) * 2 - 1
            return Hadamard(site.dim, signs.to(torch.int8))
        if self.matrix == "permutation":
            starts = range(0, site.width, site.dim)
            return Permutation(torch.cat([torch.randperm(site.dim, generator=generator) + start for start in starts]))
        shape = site.width // site.dim, site.dim, site.dim
        q, r = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))
        return Orthogonal(q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1))
