"""A product of two thin matrices that runs beside the codes: w = w_hat + left right.

    left    [N, r]
    right   [r, K]

It is the best approximation of rank r of what rounding lost: by default of the outputs (LQER,
https://arxiv.org/abs/2402.02446; with all of the Gram matrix: CALDERA, https://arxiv.org/abs/2405.18886), else of the
weights (LoRC of ZeroQuant-V2, https://arxiv.org/abs/2303.08302).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.int import DTYPES
from qtool.residuals._base import Infos, Residual, Tensors
from qtool.stats._base import Statistic
from qtool.stats.gram import Gram

DAMP = 1e-4
"""Added to the eigenvalues of the Gram matrix, relative to their mean, so that its root has an inverse."""


class LowRank(Residual):
    """A branch of low rank.

    Attributes:
        rank: columns of the left and rows of the right matrix.
        whiten: true approximates the outputs' error, by the Gram matrix of the inputs; false that of the weights.
        dtype: type of both matrices.
    """

    rank: int = Field(32, ge=1)
    whiten: bool = True
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix, to whiten with."""
        return frozenset({Gram}) if self.whiten else frozenset()

    def infos(self, n: int, k: int) -> Infos:
        """See `Residual.infos`."""
        dtype = DTYPES[self.dtype]
        return {"left": ((n, self.rank), dtype), "right": ((self.rank, k), dtype)}

    def misfit(self, n: int, k: int) -> str | None:
        """See `Residual.misfit`."""
        return f"rank {self.rank} is more than {n} x {k} matrices have" if self.rank > min(n, k) else None

    def fit(self, error: Tensor, gram: Tensor | None) -> Tensors:
        """See `Residual.fit`.

        Of E S = U D V^T, with S the symmetric root of the Gram matrix H, the best part of rank r is U_r D_r V_r^T
        (Eckart and Young), and tr((E - L R) H (E - L R)^T) is the squared norm of E S - L R S: so R = V_r^T S^-1.
        """
        if self.whiten and gram is not None:
            root, inverse = roots(gram)
            left, size, right = largest(error @ root, self.rank)
            right = right @ inverse
        else:
            left, size, right = largest(error, self.rank)
        length, dtype = right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny), DTYPES[self.dtype]
        even = (size / length).sqrt()  # columns of the left are as long as rows of the right: neither leaves its type
        return {"left": (left * (even * length)).to(dtype), "right": (right * even.unsqueeze(1)).to(dtype)}

    def apply(self, w_hat: Tensor, tensors: Tensors) -> Tensor:
        """See `Residual.apply`."""
        return torch.addmm(w_hat, tensors["left"].float(), tensors["right"].float())

    def rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        """See `Residual.rows`."""
        return {"left": tensors["left"][start:stop], "right": tensors["right"]}


def largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [N, r], singular values [r], V^T [r, K]) of a matrix's best approximation of that rank."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root of a damped Gram matrix, and its inverse, float32 [K, K] each."""
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=0)
    scale = (values + DAMP * values.mean()).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # no input at all: all errors count alike
    return ((vectors * scale) @ vectors.T).float(), ((vectors / scale) @ vectors.T).float()
