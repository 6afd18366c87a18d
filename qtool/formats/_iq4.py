"""What IQ4_NL and IQ4_XS share: a table of 16 levels, denser around zero, and its search.

w_hat = d * m * T[code]     m an integer per group of 32 columns in IQ4_XS, 1 in IQ4_NL
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qtool.formats._base import Params, row_chunks
from qtool.formats._ggml import BlockFormat, fp16
from qtool.numerics.ggml.table import ggml_table_scales
from qtool.numerics.scales.table_search import EFFORT, half_steps, table_scales


@cache
def table() -> Tensor:
    """float32 [16], `kvalues_iq4nl` of ggml, from the package gguf."""
    from gguf.quants import IQ4_NL

    return torch.tensor(IQ4_NL.kvalues, dtype=torch.float32)


class IQ4(BlockFormat):
    """Blocks of groups of 32 columns with 4-bit codes into the table.

    Attributes:
        limit: multipliers of d lie in [-limit, limit - 1].
    """

    search: Literal["fast", "default", "thorough"] = "default"
    limit: ClassVar[int] = 1

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return 32

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return table()

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        parts = [self._fit(part, importance) for part in row_chunks(w)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit(self, w: Tensor, importance: Tensor | None) -> Params:
        groups, effort = (32, self.columns // 32), EFFORT[self.search]
        if self._alone:
            return self.stored(*table_scales(w, importance, self.levels(), groups, self.limit, effort))
        low, scaled = float(self.levels()[0]), None if importance is None else self.usable(importance)
        d, m = ggml_table_scales(w, scaled, half_steps(self.levels()), low, groups[1], self.limit)
        theirs = d.half().float(), m
        found = self.stored(*table_scales(w, importance, self.levels(), groups, self.limit, effort, theirs))
        return self.no_worse(found, self.stored(*theirs), w, importance)

    def stored(self, d: Tensor, multipliers: Tensor) -> Params:
        """Rounds d to fp16. Raises NumericsError: too large for it."""
        return {"d": fp16(d, self.label)}
