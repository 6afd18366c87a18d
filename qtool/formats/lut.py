"""A table of at most 256 levels, and a scale per row or group of columns: `w_hat = s * T[code]`.

Tables that have names, for shorthands such as `nf4-g64`:

- `nf4`: quantiles of a normal distribution, with a zero (QLoRA, https://arxiv.org/abs/2305.14314);
- `bnbfp4`: the 4-bit float of bitsandbytes, of which one level is near zero (https://arxiv.org/abs/2305.14314);
- `lloyd2`, `lloyd3`, `lloyd4`: least squared error of normal numbers, which is what k-means finds of many
  (https://ieeexplore.ieee.org/document/1057548);
- `pot4`: powers of two; `post4`: powers of its root, and zero (ASQ, https://arxiv.org/abs/2504.17263);
- `balanced2`: -2 to 2, the five levels of ABQ-LLM's "2*" (https://arxiv.org/abs/2408.08554);
- `ternary`: -1, 0, 1; `binary`: 0, 1; `signs`: -1, 1: planes, of which several make a matrix (residual `codes`).

Other tables are given as lists of numbers.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from qtool.formats._base import Format, Params, row_chunks
from qtool.formats._compare import better_of
from qtool.formats.int import DTYPES, round_scales
from qtool.numerics.scales.level_search import level_scales, lloyd_max, nearest
from qtool.numerics.scales.search import relative

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
TWELFTHS = (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Positive levels of the 4-bit float of bitsandbytes, in twelfths."""
POWERS = [2.0**-i for i in range(7)]


def mirrored(positive: list[float]) -> tuple[float, ...]:
    """A symmetric table with a zero."""
    return tuple(sorted([*positive, 0.0, *(-level for level in positive)]))


TABLES = {
    "nf4": tuple(NF4),
    "bnbfp4": mirrored([level / 12 for level in TWELFTHS]),
    "pot4": mirrored(POWERS),
    "post4": mirrored([level**0.5 for level in POWERS]),
    "balanced2": (-2.0, -1.0, 0.0, 1.0, 2.0),
    "ternary": (-1.0, 0.0, 1.0),
    "binary": (0.0, 1.0),
    "signs": (-1.0, 1.0),
}
LLOYD = re.compile(r"lloyd([2-4])")
Name = Literal[
    "nf4", "bnbfp4", "lloyd2", "lloyd3", "lloyd4", "pot4", "post4", "balanced2", "ternary", "binary", "signs"
]
SHORTHAND = re.compile(r"([a-z]+\d?)-(?:g(\d+)|channel)")
NAMES = (*TABLES, "lloyd2", "lloyd3", "lloyd4")


class LUT(Format):
    """Levels from a table.

    Attributes:
        table: a name, or the levels.
        group: columns per scale, or "channel": one scale a row.
        scales: "minmax" covers every weight; "search" minimizes the (importance-weighted) squared error.
        scale_dtype: how scales are stored.
    """

    examples: ClassVar[tuple[str, ...]] = ("nf4-g64", "lloyd3-g64", "post4-g64", "ternary-g128")

    table: Name | Annotated[tuple[float, ...], Field(min_length=2, max_length=256)]
    group: Annotated[int, Field(gt=0)] | Literal["channel"]
    scales: Literal["minmax", "search"] = "search"
    scale_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    @field_validator("table", mode="before")
    @classmethod
    def _fixed(cls, table: object) -> object:
        return tuple(table) if isinstance(table, list) else table  # instances are hashable

    @field_validator("table")
    @classmethod
    def _ascends(cls, table: str | tuple[float, ...]) -> str | tuple[float, ...]:
        if not isinstance(table, str) and not all(a < b for a, b in pairwise(table)):
            raise ValueError("levels have to ascend")
        return table

    @property
    def label(self) -> str:
        """`nf4-g64`; `lut5-g64` for a list of five levels."""
        name = self.table if isinstance(self.table, str) else f"lut{len(self.table)}"
        return f"{name}-" + (f"g{self.group}" if isinstance(self.group, int) else self.group)

    @classmethod
    def parse(cls, text: str) -> LUT | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        if not match or match[1] not in NAMES:
            return None
        return cls.model_validate({"table": match[1], "group": int(match[2]) if match[2] else "channel"})

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.group if isinstance(self.group, int) else None

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.tensor(named(self.table) if isinstance(self.table, str) else self.table)

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        scales = n * (k // (self.group_columns or k))
        return n * k * self.code_bits + scales * DTYPES[self.scale_dtype].itemsize * 8

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        groups = w.shape[1] // (self.group_columns or w.shape[1])
        covering = self._store(self._covering(w, groups))
        if self.scales == "minmax":
            return covering
        parts = [level_scales(part, importance, self.levels(), groups) for part in row_chunks(w)]
        found = self._store(torch.cat(parts))
        if self._alone:
            return found
        return better_of(self, w, covering, found, relative(importance, w.shape[1], groups), groups)

    def _covering(self, w: Tensor, groups: int) -> Tensor:
        """The least scales that clip no weight, [N, G]; weights on a side without levels are not looked at."""
        levels, (low, high) = self.levels(), w.reshape(len(w), groups, -1).aminmax(dim=2)
        top, bottom = max(float(levels[-1]), 0.0), min(float(levels[0]), 0.0)
        wanted = [extreme / level for extreme, level in ((high, top), (low, bottom)) if level != 0]
        return torch.stack(wanted).amax(0).clamp_min(0)

    def _store(self, scale: Tensor) -> Params:
        """Rounds to the stored type; a group of zeros gets scale 1, because runtimes dislike dividing by 0."""
        scale = round_scales(scale, self.scale_dtype, self.label)
        return {"scale": torch.where(scale == 0, torch.ones_like(scale), scale)}

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        scale = params["scale"].float()
        return scale, torch.zeros_like(scale)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`."""
        return self._store(scale)

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`; a tie goes to the lower level."""
        scale = self.affine(params)[0]
        ratio = w.reshape(*scale.shape, -1) / scale[..., None]
        return nearest(ratio, self.levels().to(w.device)).to(torch.uint8).view(w.shape)


@cache
def named(table: str) -> tuple[float, ...]:
    """The levels of a table that has a name."""
    found = LLOYD.fullmatch(table)
    return lloyd_max(1 << int(found[1])) if found else TABLES[table]
