"""Small floating-point numbers of 3 to 8 bits with one real scale per tensor, row, group of columns, or block.

    w_hat = s * v        v a float of 1 sign bit, E exponent and M mantissa bits, called eEmM

FP8 is E4M3 (largest value 448) or E5M2 (57344), as in https://arxiv.org/abs/2209.05433; all others have no infinities
and no NaN. E1M6 and its kin are integers. A power-of-two change of the exponent's bias is a change of scale, and a real
one too, so searching the bias, as LLM-FP4 does (https://arxiv.org/abs/2310.16836), is searching the scale.

`constraint` ties scales, so that products need shifts only (ZeroQuant-FP, https://arxiv.org/abs/2307.09782): `power`
makes each a power of two, `ratio` makes those of a row power-of-two multiples of each other.

A search covers less than an octave: levels repeat from octave to octave, so what counts is where the weights fall
between two powers of two, and whether the largest of them are clipped.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from qtool.formats import _groups
from qtool.formats._base import Format, Params
from qtool.formats._compare import better_of
from qtool.formats._groups import Group, Grouped, Scales
from qtool.formats._scaled import Scaled
from qtool.formats.int import DTYPES, round_scales
from qtool.numerics.grids import minifloat
from qtool.numerics.grids.minifloat import Grid, ceil_power, floor_power, nearest_power
from qtool.numerics.scales.search import relative

USUAL = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e3m2", 7: "e3m3", 8: "e4m3"}
"""What a shorthand means that does not say it."""
SHORTHAND = re.compile(rf"fp(?P<bits>[3-8])(?:-(?P<element>e\dm\d))?-{_groups.PATTERN}")
SWEEP = torch.logspace(-1.5, 1.0, 24, 2.0)
"""Scales tried, relative to the one that just covers the largest weight."""
OCTAVES = torch.tensor([2.0, 1.0, 0.5, 0.25])
"""The same where scales are powers of two."""
PHASES = [2.0 ** (i / 8) for i in range(8)]
"""Common factors tried for the scales of a row that share one."""


class FP(Grouped, Scaled):
    """Minifloats.

    Attributes:
        element: how many exponent and mantissa bits: "e4m3".
        group: columns per scale, or "channel" (of a weight) and "token" (of an input): one scale a row, or "tensor";
            of a KV cache "tensor", "head", "channel" (of a head) or "token".
        rows: rows per scale; more than one makes blocks of rows x group.
        scales: "minmax" covers every weight; "search" minimizes the (importance-weighted) squared error. Where
            calibration finds scales, of inputs and KV caches, a number such as 99.9 covers that percentage of numbers.
        constraint: "none"; "power": scales are powers of two; "ratio": they are power-of-two multiples within a row.
        scale_dtype: how scales are stored.
    """

    examples = ("fp8-channel", "fp8-tensor", "fp8-token", "fp8-block", "fp8-e5m2-channel", "fp6-channel", "fp4-g16")

    element: str = Field(pattern="^e[1-7]m[0-6]$")
    group: Group
    rows: int = Field(default=1, ge=1)
    scales: Scales = "search"
    constraint: Literal["none", "power", "ratio"] = "none"
    scale_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 3 <= self.bits <= 8:
            raise ValueError(f"floats have 3 to 8 bits, {self.element} has {self.bits}")
        _groups.check(self.group, self.rows)
        if self.constraint == "ratio" and (self.rows > 1 or not isinstance(self.group, int)):
            raise ValueError(f"scales of a row share a ratio where it has several, not with group {self.group}")
        return self

    @property
    def bits(self) -> int:
        """Of a code."""
        return 1 + int(self.element[1]) + int(self.element[3])

    @property
    def label(self) -> str:
        """`fp8-channel`, `fp6-e2m3-g32`, `fp8-block`."""
        element = "" if self.element == USUAL[self.bits] else f"-{self.element}"
        return f"fp{self.bits}{element}-{_groups.spell(self.group, self.rows)}"

    @classmethod
    def parse(cls, text: str) -> FP | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        if not match:
            return None
        fmt = cls.model_validate({"element": match["element"] or USUAL[int(match["bits"])], **_groups.parse(match)})
        return fmt if fmt.bits == int(match["bits"]) else None

    @property
    def grid(self) -> Grid:
        """See `Scaled.grid`."""
        return minifloat.minifloat(int(self.element[1]), int(self.element[3]))

    @property
    def block_columns(self) -> int | None:
        """See `Format.block_columns`; scales that share a ratio are fitted together."""
        return None if self.constraint == "ratio" else self.group_columns

    @property
    def by_rows(self) -> bool:
        """See `Format.by_rows`."""
        return self.group_rows == 1 or self._largest is not None

    @property
    def needs_largest(self) -> bool:
        """See `Format.needs_largest`. Runtimes round matrices that they merge anew if their scales differ."""
        return self.group == "tensor" and self.scales == "minmax"

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        entries = _groups.count(self.group, self.rows, n, k)
        return n * k * self.bits + entries * DTYPES[self.scale_dtype].itemsize * 8

    def scale(self, params: Params) -> Tensor:
        """See `Scaled.scale`."""
        return params["scale"].float()

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        rows, width = self.group_rows or len(w), self.group_columns or w.shape[1]
        groups = w.shape[1] // width
        covering = self._store(self._covering(self._largest_of_blocks(w, rows, groups) / self.grid.highest))
        if self.scales == "minmax":
            return {"scale": _groups.untile(covering["scale"], rows, len(w))}
        tiles, importance = _groups.tile(w, importance, rows, width)
        found = self._store(self.in_chunks(lambda part: self._wanted(part, importance, groups), tiles))
        compared = 1 if self.constraint == "ratio" else groups
        weight = relative(importance, tiles.shape[1], compared)
        chosen = better_of(self, tiles, covering, found, weight, compared)
        return {"scale": _groups.untile(chosen["scale"], rows, len(w))}

    def _largest_of_blocks(self, w: Tensor, rows: int, groups: int) -> Tensor:
        """Largest magnitudes, float32 [N, C] -> [T, G], T rows of blocks; or what is known of the whole matrix."""
        found = self.largest(w, groups)
        blocks, _ = _groups.tile(found, None, rows, 1)
        largest = blocks.view(len(blocks), groups, -1).amax(-1)
        known = self._largest if self.needs_largest else None
        return largest if known is None else torch.full_like(largest, known)

    def _wanted(self, w: Tensor, importance: Tensor | None, groups: int) -> Tensor:
        """The scales with the least error, float32 [N, C] -> [N, G]."""
        ends = self.extents(w, importance, groups) / self.grid.highest
        if self.constraint == "none":
            tries = ends[..., None] * SWEEP.to(w.device)
            return minifloat.best_scale(w, importance, tries.flatten(2), self.grid, free=True)
        phases = PHASES if self.constraint == "ratio" else [1.0]
        best: Params = {}
        weight = relative(importance, w.shape[1], 1)
        for phase in phases:
            tries = floor_power(ends / phase)[..., None] * OCTAVES.to(w.device) * phase
            found = {"scale": minifloat.best_scale(w, importance, tries.flatten(2), self.grid, free=False)}
            best = better_of(self, w, best, found, weight, 1) if best else found
        return best["scale"]

    def _covering(self, full: Tensor) -> Tensor:
        """The least scales under the constraint that cover every weight; `full` just does without it, [N, G]."""
        if self.constraint == "none":
            return full
        base = 1.0 if self.constraint == "power" else full.amax(1, keepdim=True).to(DTYPES[self.scale_dtype]).float()
        return ceil_power(full / base) * base

    def _store(self, scale: Tensor) -> Params:
        """Rounds to the stored type; a group of zeros gets scale 1, because runtimes dislike dividing by 0."""
        scale = round_scales(scale, self.scale_dtype, self.label)
        fill = torch.ones_like(scale)
        if self.constraint == "ratio":
            common = scale.amax(1, keepdim=True)
            fill = torch.where(common > 0, common, fill)
        return {"scale": torch.where(scale == 0, fill, scale)}

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`; a scale that is not wanted positive stays."""
        old = self.scale(params)
        scale = torch.where(scale > 0, scale, old)
        if self.constraint != "none":
            base = 1.0 if self.constraint == "power" else old.amax(1, keepdim=True)
            scale = nearest_power(scale / base) * base
        return self._store(scale)

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`. Without a constraint, scales may as well be what one would have made them."""
        if isinstance(fmt, FP) and self.constraint == "none":
            fmt = fmt.model_copy(update={"constraint": "none"})
        return super().may_hold(fmt)
