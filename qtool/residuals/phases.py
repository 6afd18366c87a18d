"""Two complex matrices of sums of 1, i, -1 and -i, each with a scale: all of a matrix, in T bits a weight.

    w = w_hat + [[Re U + Re V, Im V - Im U], [Im U + Im V, Re U - Re V]]

    codes   uint8 [N / 2, ceil(2 T K / 8)]   of U, and of V beside it, packed to 2 T bits: two bits a term, the first
                                             lowest, 0 to 3 for 1, i, -1, -i
    table   float32 [4, 3^T, 3^T]            entries of the four blocks, row after row, by the signs (-1, 0, 1, the
                                             first term counting least) that U and V have on the block's axis

So are models of Fairy2i (https://arxiv.org/abs/2512.02901), whose checkpoints hold weights that the program that runs
them rounds by a rule, which is that of `fit`; or what it makes of them, which is then taken over exactly, since the
table has every sum as it stands there. The format beside is `codeless`, which has no codes.

Rows of the upper and the lower half share codes: some rows alone have those that they need, and

    lower   uint8 [rows]   which of them are of the lower half

Shape letters: T terms of a sum.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qtool.numerics.grids.bits import pack, unpack
from qtool.numerics.grids.phases import cells, recognized, rounded
from qtool.residuals._base import Infos, Residual, Tensors


class Phases(Residual):
    """Phase planes of a widely linear map.

    Attributes:
        terms: of a sum, and bits of a weight.
    """

    terms: int = Field(2, ge=1, le=3)

    def misfit(self, n: int, k: int) -> str | None:
        """See `Residual.misfit`."""
        return f"{n} x {k} cannot be halved both ways" if n % 2 or k % 2 else None

    def infos(self, n: int, k: int) -> Infos:
        """See `Residual.infos`."""
        sums: int = 3**self.terms
        return {
            "codes": ((n // 2, (k * 2 * self.terms + 7) // 8), torch.uint8),
            "table": ((4, sums, sums), torch.float32),
        }

    def fit(self, error: Tensor, gram: Tensor | None) -> Tensors:
        """See `Residual.fit`."""
        codes, table = recognized(error, self.terms) or rounded(error, self.terms)
        return {"codes": pack(codes, 2 * self.terms), "table": table}

    def apply(self, w_hat: Tensor, tensors: Tensors) -> Tensor:
        """See `Residual.apply`."""
        codes = unpack(tensors["codes"], 2 * self.terms, w_hat.shape[1]).to(w_hat.device)
        added = tensors["table"].flatten().to(w_hat.device)[cells(codes, self.terms)]
        if "lower" in tensors:
            at = torch.arange(len(codes), device=w_hat.device)
            added = added[at + tensors["lower"].to(w_hat.device).long() * len(codes)]
        return w_hat + added

    def rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        """See `Residual.rows`."""
        codes, half = tensors["codes"], len(tensors["codes"])
        if "lower" in tensors:
            return {**tensors, "codes": codes[start:stop], "lower": tensors["lower"][start:stop]}
        at = torch.arange(start, min(stop, 2 * half), device=codes.device)
        return {**tensors, "codes": codes[at % half], "lower": (at >= half).to(torch.uint8)}
