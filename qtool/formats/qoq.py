"""QoQ's progressive groups: integers of 4 bits inside of integers of 8 bits, for INT8 arithmetic on 4-bit weights.

    w_hat = s0 * w8        w8 = s1 * (q - z), q and z from 0 to 15, a whole s1 per group, s0 in fp16 per row

s0 puts the largest weight of a row on 119: rounding to steps of s1 then stays within 8 bits (the protective range of
QServe, https://arxiv.org/abs/2405.04532). Here no code at all may leave 8 bits, since methods may choose any.
`scales: search` tries all sensible (s1, z); the paper's rule is `minmax`.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._base import Format, Params
from qtool.formats._compare import better_of
from qtool.numerics.grids.progressive import largest_step, progressive
from qtool.numerics.scales.search import relative

PROTECTED = 119
"""The largest magnitude of w8 before it is rounded to steps."""
SMALLEST = 2.0**-24
"""The smallest fp16 number."""
TIGHTEST = 0.5
SHORTHAND = re.compile(r"qoq-g(\d+)")


class QoQ(Format):
    """4-bit integers in 8-bit integers.

    Attributes:
        group: columns per step and zero point.
        scales: "minmax" covers every weight; "search" minimizes the (importance-weighted) squared error.
    """

    examples: ClassVar[tuple[str, ...]] = ("qoq-g128", "qoq-g64")

    group: int = Field(default=128, gt=0)
    scales: Literal["minmax", "search"] = "search"

    @property
    def label(self) -> str:
        """`qoq-g128`."""
        return f"qoq-g{self.group}"

    @classmethod
    def parse(cls, text: str) -> QoQ | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        return cls(group=int(match[1])) if match else None

    @property
    def group_columns(self) -> int:
        """See `Format.group_columns`."""
        return self.group

    @property
    def block_columns(self) -> None:
        """See `Format.block_columns`: a row has one s0."""

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.arange(16.0)

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`: 4 bits a code, 8 and 4 a group, 16 a row."""
        return n * k * 4 + n * (k // self.group) * 12 + n * 16

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        largest = w.abs().amax(1, keepdim=True)
        s0 = torch.where(largest == 0, 1.0, (largest / PROTECTED).clamp_min(SMALLEST)).half()
        if not bool(s0.isfinite().all()):
            raise NumericsError(f"{self.label} stores the scales of rows in fp16: its weights are too large, or NaN")
        w8, groups = w / s0.float(), w.shape[1] // self.group
        low, high = w8.view(len(w), groups, -1).aminmax(dim=-1)
        low, high = low.clamp_max(0), high.clamp_min(0)
        steps = ((high - low) / 15).round().clamp_min(1)
        zero = (-low / steps).round().clamp(0, 15).to(torch.uint8)
        covering = {"row": s0, "step": torch.minimum(steps.int(), largest_step(zero)).to(torch.uint8), "zero": zero}
        if self.scales == "minmax":
            return covering
        step, zero = progressive(w8, importance, groups, TIGHTEST)
        found = {"row": s0, "step": step, "zero": zero}
        return better_of(self, w, covering, found, relative(importance, w.shape[1], groups), groups)

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`; exact, since s0, s1 and z have 11, 5 and 4 bits."""
        scale = params["row"].float() * params["step"].float()
        return scale, -scale * params["zero"].float()

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`; s0 and zero points stay."""
        wanted = (scale / params["row"].float()).round().clamp(1, 255).int()
        return params | {"step": torch.minimum(wanted, largest_step(params["zero"])).to(torch.uint8)}
