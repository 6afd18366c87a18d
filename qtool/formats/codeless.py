"""No codes at all: every weight is zero, and what a matrix is stands in its residuals.

For corrections that say all of a matrix, such as `phases` (https://arxiv.org/abs/2512.02901). Alone it makes layers of
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Params


class Codeless(Format):
    """One level, which takes no bits; a row keeps a scale because every format has one."""

    @property
    def label(self) -> str:
        """`codeless`."""
        return "codeless"

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return None

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.zeros(1)

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        return n * 16

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        return {"scale": torch.ones(len(w), 1, dtype=torch.bfloat16, device=w.device)}

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        scale = params["scale"].float()
        return scale, torch.zeros_like(scale)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`: nothing to choose."""
        return params

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`."""
        return torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
