"""What has to become of a model before GGUF can hold it: other tensors, with which it computes the same.

Shape letters: N rows, K columns of a tensor as it becomes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor.

    Attributes:
        factors: what its rows are multiplied with, float64 [N] or [1]; it is float32 then. None: nothing.
        columns: column j is what was column `columns[j]`, int64 [K]. None: they stay.
        count: N, where that is more than there are; row 0 stands for those that are missing. None: as many.
    """

    factors: Tensor | None = None
    columns: Tensor | None = None
    count: int | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what becomes of a tensor of that shape."""
        return (self.count or shape[0], *shape[1:])

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what becomes of a tensor of that type."""
        return dtype if self.factors is None else torch.float32

    def apply(self, rows: Tensor, start: int) -> Tensor:
        """What becomes of rows `start` and following, [*, K] or [*]."""
        if self.columns is not None:
            rows = rows[..., self.columns]
        if self.factors is None:
            return rows
        own = self.factors if len(self.factors) == 1 else self.factors[start : start + len(rows)]
        return (rows.double() * own.view(-1, *[1] * (rows.ndim - 1))).float()

    @property
    def digest(self) -> str:
        """Hex digest of all of it."""
        parts = [None if x is None else x.tolist() for x in (self.factors, self.columns)]
        return hashlib.sha256(json.dumps([*parts, self.count]).encode()).hexdigest()


@dataclass(frozen=True)
class Equal:
    """What has to become of a language model.

    Attributes:
        fields: of its config.json.
        changes: of tensors, by how their names end.
        what: in a few words.
        untied: whether the output layer becomes a matrix of its own, where it was the token embedding's.
    """

    fields: Mapping[str, Any]
    changes: Mapping[str, Change]
    what: str
    untied: bool = False

    def change(self, name: str) -> Change | None:
        """What becomes of a tensor; None: nothing."""
        return next((change for end, change in self.changes.items() if name.endswith(end)), None)
