"""Integers of 2 to 8 bits with a scale and a free offset per group of columns: `w_hat = s * q + m`, q in [0, 2^b - 1].

What MLX stores (https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html), and what HQQ
leaves as a zero point that is no integer (https://dropbox.github.io/hqq_blog/). Its kin in GGUF are Q4_1 and Q5_1.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, alike, expand, too_wide
from qtool.formats._compare import better_of
from qtool.formats.int import DTYPES, round_scales
from qtool.numerics.scales import search
from qtool.numerics.scales.search import relative

SHORTHAND = re.compile(r"biased([2-8])-(?:g(\d+)|channel)")


class Biased(Format):
    """Integers and offsets.

    Attributes:
        bits: 2 to 8.
        group: columns per scale and offset, or "channel": one pair a row.
        scales: "minmax" covers every weight; "search" minimizes the (importance-weighted) squared error.
        scale_dtype: how scales and offsets are stored.
    """

    examples: ClassVar[tuple[str, ...]] = ("biased4-g64", "biased2-g32")
    free_offset: ClassVar[bool] = True

    bits: int = Field(ge=2, le=8)
    group: Annotated[int, Field(gt=0)] | Literal["channel"]
    scales: Literal["minmax", "search"] = "search"
    scale_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    @property
    def label(self) -> str:
        """`biased4-g64`, `biased8-channel`; options that differ from defaults are left out."""
        return f"biased{self.bits}-" + (f"g{self.group}" if isinstance(self.group, int) else self.group)

    @classmethod
    def parse(cls, text: str) -> Biased | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        if not match:
            return None
        return cls.model_validate({"bits": int(match[1]), "group": int(match[2]) if match[2] else "channel"})

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.group if isinstance(self.group, int) else None

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.arange(1 << self.bits, dtype=torch.float32)

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        groups = n * (k // (self.group_columns or k))
        return n * k * self.bits + groups * 2 * DTYPES[self.scale_dtype].itemsize * 8

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        width, highest = self.group_columns or w.shape[1], (1 << self.bits) - 1
        low, high = w.reshape(len(w), -1, width).aminmax(dim=-1)
        covering = self._store((high - low) / highest, low)
        if self.scales == "minmax":
            return covering
        found, groups = self._store(*search.free_offset(w, importance, width, highest)), w.shape[1] // width
        if self._alone:
            return found
        return better_of(self, w, covering, found, relative(importance, w.shape[1], groups), groups)

    def _store(self, scale: Tensor, offset: Tensor) -> Params:
        pairs = {"scale": scale, "offset": offset}
        return {name: round_scales(p, self.scale_dtype, self.label) for name, p in pairs.items()}

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        return params["scale"].float(), params["offset"].float()

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`."""
        return self._store(scale, offset)

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`: integers of no more bits whose groups can be split into groups of this format."""
        levels, mine, theirs = fmt.levels(), self.group_columns, fmt.group_columns
        if float(levels[-1] - levels[0]) != len(levels) - 1:
            return f"{self.label} holds no {fmt.label}"
        if theirs is not None and (mine is None or theirs % mine):
            return f"the groups of {fmt.label} do not consist of groups of {self.label}"
        return too_wide(fmt, False, self) if len(levels) > 1 << self.bits else None

    def hold(self, quantized: Quantized) -> Quantized | str:
        """See `Format.hold`. Scales that are not exact in `scale_dtype` are stored in a type in which they are."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        k = codes.shape[1]
        reason = self.may_hold(fmt) or self.misfit(k)
        if reason or alike(self, fmt):
            return reason or quantized
        scale, offset = (expand(p, k // (self.group_columns or k)) for p in fmt.affine(params))
        offset = offset + float(fmt.levels()[0]) * scale
        wanted = fmt.decode(codes, params)
        for dtype in (self.scale_dtype, *DTYPES):
            rounded = self.model_copy(update={"scale_dtype": dtype})
            result = Quantized(codes, {"scale": scale.to(DTYPES[dtype]), "offset": offset.to(DTYPES[dtype])}, rounded)
            if torch.equal(result.decode(), wanted):
                return result
        return "some offsets are not exact in fp32"
