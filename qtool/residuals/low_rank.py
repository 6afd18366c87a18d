"""A product of two thin matrices that runs beside the codes: w = w_hat + left right.

    left    [N, r]
    right   [r, K]

It is the best approximation of rank r of what rounding lost: by default of the outputs (LQER,
https://arxiv.org/abs/2402.02446; with all of the Gram matrix: CALDERA, https://arxiv.org/abs/2405.18886), else of the
weights (LoRC of ZeroQuant-V2, https://arxiv.org/abs/2303.08302). Or of the matrix itself, before anything is rounded,
so that codes hold the rest (SVDQuant, https://arxiv.org/abs/2411.05007). Where inputs are rounded, the branch reads
them as they were.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.int import DTYPES
from qtool.residuals._base import Infos, Residual, Tensors
from qtool.stats._base import Statistic
from qtool.stats.gram import Gram

ROUNDING = 1e-13
"""Squares of singular values that are smaller, relative to the largest, are rounding errors."""


class LowRank(Residual):
    """A branch of low rank.

    Attributes:
        rank: columns of the left and rows of the right matrix.
        whiten: true approximates the outputs' error, by the Gram matrix of the inputs; false that of the weights.
        dtype: type of both matrices.
        start: "error" approximates what codes leave; "weight" the matrix itself, then codes are chosen for the rest.
    """

    apart: ClassVar[bool] = True

    rank: int = Field(32, ge=1)
    whiten: bool = True
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    start: Literal["error", "weight"] = "error"

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix, to whiten with."""
        return frozenset({Gram}) if self.whiten else frozenset()

    @property
    def before(self) -> bool:
        """See `Residual.before`."""
        return self.start == "weight"

    def output(self, x: Tensor, tensors: Tensors) -> Tensor:
        """See `Residual.output`."""
        return x @ tensors["right"].to(x).T @ tensors["left"].to(x).T

    def infos(self, n: int, k: int) -> Infos:
        """See `Residual.infos`."""
        dtype = DTYPES[self.dtype]
        return {"left": ((n, self.rank), dtype), "right": ((self.rank, k), dtype)}

    def misfit(self, n: int, k: int) -> str | None:
        """See `Residual.misfit`."""
        return f"rank {self.rank} is more than {n} x {k} matrices have" if self.rank > min(n, k) else None

    def fit(self, error: Tensor, gram: Tensor | None) -> Tensors:
        """See `Residual.fit`.

        What is left of the outputs, tr((E - L R) H (E - L R)^T), is least for the projection of E on the r leading
        left singular vectors U of E H^(1/2) (Eckart and Young): L = U, R = U^T E. H need not have an inverse.
        """
        left = leading(error, gram if self.whiten else None, self.rank)
        right = left.T @ error
        even = right.norm(dim=1).sqrt()  # columns of the left are as long as rows of the right: neither leaves its type
        even = torch.where(even > 0, even, 1.0)
        dtype = DTYPES[self.dtype]
        return {"left": (left * even).to(dtype), "right": (right / even.unsqueeze(1)).to(dtype)}

    def apply(self, w_hat: Tensor, tensors: Tensors) -> Tensor:
        """See `Residual.apply`."""
        return torch.addmm(w_hat, tensors["left"].float(), tensors["right"].float())

    def rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        """See `Residual.rows`."""
        return {"left": tensors["left"][start:stop], "right": tensors["right"]}


def leading(error: Tensor, gram: Tensor | None, rank: int) -> Tensor:
    """The leading left singular vectors of E H^(1/2), float32 [N, r]; zeros from where there are no more.

    They come from the eigenvectors of a product with its transpose, of whichever side is shorter, in float64.

    Args:
        error: E, float32 [N, K].
        gram: H, float32 [K, K]; None: the identity.
        rank: r.
    """
    e = error.double()
    if gram is not None:
        values, vectors = torch.linalg.eigh(gram.double())
        e = (e @ vectors) * values.clamp(min=0).sqrt()
    if len(e) <= e.shape[1]:
        sizes, left = torch.linalg.eigh(e @ e.T)
        sizes, left = sizes[-rank:].flip(0), left[:, -rank:].flip(1)
    else:
        sizes, right = torch.linalg.eigh(e.T @ e)
        sizes, right = sizes[-rank:].flip(0), right[:, -rank:].flip(1)
        left = (e @ right) / sizes.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return torch.where(sizes > ROUNDING * sizes[:1], left, 0.0).float()
