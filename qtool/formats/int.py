"""Integers of 2 to 8 bits with one scale per tensor, row, group of columns, or block of rows and columns.

    symmetric:   w_hat = s * q             q in [-2^(b-1), 2^(b-1) - 1]
    asymmetric:  w_hat = s * (q - z)       z an integer in the same range

The code range, and the storage of scales in the model's own dtype, are those of compressed-tensors
(https://github.com/vllm-project/compressed-tensors). A symmetric scale may be negative: the grid has one more level
below zero than above, and the sign says on which side of the group that level helps. Its min-max fit is
amax / (2^(b-1) - 1/2), which splits the error of the largest weight between both ends.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from qtool.errors import NumericsError
from qtool.formats import _groups
from qtool.formats._base import Format, Params, Quantized, alike, expand, too_wide
from qtool.formats._compare import better_of
from qtool.formats._groups import Group, Grouped, Scales
from qtool.numerics.checks import unwatched
from qtool.numerics.grids.affine import ranges
from qtool.numerics.grids.minifloat import largest
from qtool.numerics.scales import search
from qtool.numerics.scales.search import IntegerScales, relative

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORTHAND = re.compile(rf"int(?P<bits>[2-8])-{_groups.PATTERN}(?P<asym>-asym)?")


class Int(Grouped):
    """Integer grid.

    Attributes:
        bits: 2 to 8.
        group: columns per scale, or "channel" (of a weight) and "token" (of an input): one scale a row, or "tensor";
            of a KV cache "tensor", "head", "channel" (of a head) or "token".
        rows: rows per scale; more than one makes blocks of rows x group.
        symmetric: no zero point.
        scales: "minmax" covers every weight; "search" minimizes the (importance-weighted) squared error. Where
            calibration finds scales, of inputs and KV caches, a number such as 99.9 covers that percentage of numbers.
        scale_dtype: how scales are stored.
    """

    examples = ("int4-g128", "int4-g64", "int4-g32", "int4-g128-asym", "int3-g64", "int8-channel", "int8-token")

    bits: int = Field(ge=2, le=8)
    group: Group
    rows: int = Field(default=1, ge=1)
    symmetric: bool = True
    scales: Scales = "search"
    scale_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _groups.check(self.group, self.rows)
        return self

    @property
    def label(self) -> str:
        """`int4-g128`, `int4-g64-asym`, `int8-channel`, `int8-b16x16`; the other options are left out."""
        return f"int{self.bits}-{_groups.spell(self.group, self.rows)}" + "-asym" * (not self.symmetric)

    @classmethod
    def parse(cls, text: str) -> Int | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        if not match:
            return None
        fields = {"bits": int(match["bits"]), "symmetric": not match["asym"], **_groups.parse(match)}
        return cls.model_validate(fields)

    @property
    def lowest(self) -> int:
        """The lowest code value q; stored codes count from it."""
        return -(1 << (self.bits - 1))

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.arange(self.lowest, -self.lowest, dtype=torch.float32)

    def storage_bits(self, n: int, k: int) -> int:
        """Codes, scales, and zero points of `bits` bits each."""
        entries = _groups.count(self.group, self.rows, n, k)
        per_entry = DTYPES[self.scale_dtype].itemsize * 8 + (0 if self.symmetric else self.bits)
        return n * k * self.bits + entries * per_entry

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        rows, width = self.group_rows or len(w), self.group_columns or w.shape[1]
        tiles, importance = _groups.tile(w, importance, rows, width)
        fitted = self._fit_groups(tiles, importance, rows * width)
        return {name: _groups.untile(p, rows, len(w)) for name, p in fitted.items()}

    def _fit_groups(self, w: Tensor, importance: Tensor | None, width: int) -> Params:
        if self.scales == "minmax":
            return self._covering(w, width)
        if self.symmetric:
            found = self._store(search.symmetric(w, importance, width, self.lowest, -self.lowest - 1))
        else:
            found = self._store(*search.zero_point(w, importance, width, self.lowest, -self.lowest - 1))
        if self._alone:
            return found
        covering, groups = self._covering(w, width), w.shape[1] // width
        return better_of(self, w, covering, found, relative(importance, w.shape[1], groups), groups)

    def search_in_walk(self) -> IntegerScales | None:
        """See `Format.search_in_walk`."""
        if self.scales == "minmax" or self.rows != 1 or not isinstance(self.group, int):
            return None
        dtype = DTYPES[self.scale_dtype]
        return IntegerScales(self.group, self.lowest, -self.lowest - 1, not self.symmetric, dtype)

    def of_search(self, *found: Tensor) -> Params:
        """See `Format.of_search`."""
        return self._store(*found)

    def _covering(self, w: Tensor, width: int) -> Params:
        """What just covers every weight of groups of some columns."""
        highest = -self.lowest - 1
        if self.symmetric:
            return self._store(largest(w, w.shape[1] // width) / (highest + 0.5))
        low, high = ranges(w, w.shape[1] // width)
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / (highest - self.lowest)
        return self._store(scale, self.lowest - low / torch.where(scale == 0, 1.0, scale))

    def _store(self, scale: Tensor, zero: Tensor | None = None) -> Params:
        """Rounds to the stored types; a group of zeros gets scale 1, because runtimes dislike dividing by 0."""
        scale = round_scales(scale, self.scale_dtype, self.label)
        params = {"scale": torch.where(scale == 0, torch.ones_like(scale), scale)}
        if zero is not None:
            params["zero"] = zero.round().clamp(self.lowest, -self.lowest - 1).to(torch.int8)
        return params

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        scale = params["scale"].float()
        return scale, torch.zeros_like(scale) if self.symmetric else -scale * params["zero"].float()

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`; zero points stay."""
        return self._store(scale) | {name: p for name, p in params.items() if name == "zero"}

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`: `w / s + z`, rounded, as runtimes compute it, which decides what is a tie."""
        if self.symmetric:
            return super().snap(w, params, importance)
        scale, zero = (params[name].float().unsqueeze(-1) for name in ("scale", "zero"))
        q = (w.reshape(*scale.shape[:2], -1) / scale).add_(zero).round_().clamp_(self.lowest, -self.lowest - 1)
        return q.sub_(self.lowest).to(torch.uint8).view(w.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """See `Format.decode`: `s * (q - z)` with one rounding, as runtimes compute it."""
        q = codes.float() + self.lowest
        if not self.symmetric:
            q = q - expand(params["zero"].float(), codes.shape[1])
        return q * expand(params["scale"].float(), codes.shape[1])

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`: other integers of no more bits whose groups can be split into groups of this one."""
        if alike(self, fmt):
            return None
        levels, mine, theirs = fmt.levels(), self.group_columns, fmt.group_columns
        consecutive = float(levels[-1] - levels[0]) == len(levels) - 1
        if not consecutive or fmt.free_offset or self.group_rows != 1 or self.group == "token":
            return f"{self.label} holds no {fmt.label}"
        if theirs is not None and (mine is None or theirs % mine):
            return f"the groups of {fmt.label} do not consist of groups of {self.label}"
        zeros = (isinstance(fmt, Int) and not fmt.symmetric) or float(levels[0]) >= 0
        if len(levels) > 1 << (self.bits - (self.symmetric and zeros)):
            return too_wide(fmt, zeros, self)
        return None

    def hold(self, quantized: Quantized) -> Quantized | str:
        """See `Format.hold`. Scales that are not exact in `scale_dtype` are stored in a type in which they are."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        n, k = codes.shape
        reason = self.may_hold(fmt) or self.misfit(k)
        if reason or alike(self, fmt):
            return reason or quantized
        scale, offset = (expand(p, k // (self.group_columns or k)) for p in fmt.affine(params))
        zero = torch.where(scale == 0, 0.0, -offset / scale).round()
        if not torch.equal(-zero * scale, offset):
            return "some offsets are no multiples of their scales"
        dtypes = (self.scale_dtype, *DTYPES)
        dtype = next(name for name in dtypes if torch.equal(scale.to(DTYPES[name]).float(), scale))
        stored = {"scale": scale.to(DTYPES[dtype])}
        move = (float(fmt.levels()[0]) - zero - self.lowest).to(torch.int16)
        if self.symmetric:
            moved = codes.reshape(*scale.shape, -1) + move.unsqueeze(-1)
            codes = moved.to(torch.uint8).reshape(n, k)
            fits = bool(((moved >= 0) & (moved < 1 << self.bits)).all())
        else:
            fits = bool(((move > self.lowest) & (move <= -self.lowest)).all())
            stored["zero"] = (-move).clamp(-128, 127).to(torch.int8)
        result = Quantized(codes, stored, self.model_copy(update={"scale_dtype": dtype}))
        return result if fits else f"some zero points are out of the range of {self.label}"


def round_scales(values: Tensor, dtype: str, label: str) -> Tensor:
    """Rounds scales, or offsets, to the type that they are stored in.

    Args:
        values: float32 of any shape.
        dtype: a name in `DTYPES`.
        label: of the format, for the message.

    Raises:
        NumericsError: too large for it, or NaN.
    """
    rounded = values.to(DTYPES[dtype])
    if not unwatched(rounded) and not bool(rounded.isfinite().all()):
        wanted, largest = f"at most {torch.finfo(rounded.dtype).max:g}", float(values.abs().max())
        hint = "use scale_dtype: fp32" if math.isfinite(largest) else None
        what = f"{label} cannot store its scales in {dtype}"
        raise NumericsError(what, wanted=wanted, found=f"{largest:g}", hint=hint)
    return rounded
