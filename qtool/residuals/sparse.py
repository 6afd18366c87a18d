"""Single weights that codes miss by too much, kept beside them: w = w_hat + a sparse matrix, row after row.

    row      int32 [N + 1]   entries before each row, and of all rows
    column   int32 [E]       ascending within a row; or int16
    value    [E]             what is added there

Chosen are the entries that matter most: error^2 H_jj, by the Gram matrix H of the inputs, which is what an error costs
if nothing makes up for it (SpQR, https://arxiv.org/abs/2306.03078; SqueezeLLM, https://arxiv.org/abs/2306.07629).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.int import DTYPES
from qtool.residuals._base import Infos, Residual, Tensors, cost
from qtool.stats._base import Statistic
from qtool.stats.gram import Gram

INDICES = {"int16": torch.int16, "int32": torch.int32}


class Sparse(Residual):
    """Outliers in compressed sparse rows.

    Attributes:
        share: of all weights that are kept, at least one of a matrix.
        sensitive: true chooses what outputs miss most, by the Gram matrix of the inputs; false the largest errors.
        dtype: type of the values.
        columns: type of column indices; the narrower one takes rows of up to 32768 columns.
    """

    share: float = Field(0.005, gt=0, le=0.5)
    sensitive: bool = True
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    columns: Literal["int16", "int32"] = "int32"

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Sizes of inputs, to weigh errors with."""
        return frozenset({Gram}) if self.sensitive else frozenset()

    def entries(self, n: int, k: int) -> int:
        """Of a matrix."""
        return max(1, round(self.share * n * k))

    def infos(self, n: int, k: int) -> Infos:
        """See `Residual.infos`."""
        count = self.entries(n, k)
        return {
            "row": ((n + 1,), torch.int32),
            "column": ((count,), INDICES[self.columns]),
            "value": ((count,), DTYPES[self.dtype]),
        }

    def misfit(self, n: int, k: int) -> str | None:
        """See `Residual.misfit`."""
        last = torch.iinfo(INDICES[self.columns]).max
        return f"indices of {k} columns do not fit {self.columns}" if k - 1 > last else None

    def fit(self, error: Tensor, gram: Tensor | None) -> Tensors:
        """See `Residual.fit`."""
        n, k = error.shape
        chosen = cost(error, gram).flatten().topk(self.entries(n, k), sorted=False).indices.sort().values
        count = torch.bincount(chosen // k, minlength=n)
        row = torch.cat([count.new_zeros(1), count.cumsum(0)])
        value = error.flatten()[chosen].to(DTYPES[self.dtype])
        return {"row": row.int(), "column": (chosen % k).to(INDICES[self.columns]), "value": value}

    def apply(self, w_hat: Tensor, tensors: Tensors) -> Tensor:
        """See `Residual.apply`."""
        row, column = tensors["row"].long(), tensors["column"].long()
        at = torch.repeat_interleave(torch.arange(len(row) - 1, device=row.device), row.diff())
        corrected = w_hat.clone()
        corrected[at, column] += tensors["value"].float()
        return corrected

    def rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        """See `Residual.rows`."""
        row = tensors["row"][start : stop + 1]
        part = slice(int(row[0]), int(row[-1]))
        return {"row": row - row[0], "column": tensors["column"][part], "value": tensors["value"][part]}

    def check(self, tensors: Tensors, n: int, k: int) -> None:
        """See `Residual.check`."""
        row, column = tensors["row"].long(), tensors["column"].long()
        if int(row[0]) != 0 or int(row[-1]) != len(column) or bool((row.diff() < 0).any()):
            raise ValueError(f"row: wanted counts that rise from 0 to {len(column)}")
        if int(column.min()) < 0 or int(column.max()) >= k:
            raise ValueError(f"column: wanted indices below {k}")
        at = torch.repeat_interleave(torch.arange(n), row.diff())
        if bool(((at * k + column).diff() <= 0).any()):
            raise ValueError("column: wanted indices that rise within a row")
