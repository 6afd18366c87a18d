"""Integers in small groups whose scales and zero points are integers themselves: `w_hat = s (q - z)`.

    s = a c + b        z = e f + g        c, f of few bits per row and group; a, b, e, g in fp16 for several rows

Groups of 16 columns so cost little more than large groups do (SpQR, https://arxiv.org/abs/2306.03078). Where the paper
rounds scales and zero points to the nearest steps between the least and the largest of its rows, a few steps around are
tried as well, and the pair that leaves the least error of the weights is kept.

Shape letters beyond the usual ones: R rows that share a second level, B such blocks of rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats._base import CHUNK, Format, Params
from qtool.formats.int import round_scales
from qtool.numerics.scales import search
from qtool.numerics.scales.search import relative

SHORTHAND = re.compile(r"bilevel([2-8])-g(\d+)")
SECOND = ("scale_step", "scale_low", "zero_step", "zero_low")
"""Names of a, b, e and g."""
SWEEPS = 2
"""Of a refit over the groups of a row."""


class Bilevel(Format):
    """Integers with two levels of scales and zero points.

    Attributes:
        bits: of a weight, 2 to 8.
        group: columns per scale and zero point.
        rows: rows that share a, b, e and g.
        second: bits of c and f.
    """

    examples: ClassVar[tuple[str, ...]] = ("bilevel3-g16", "bilevel4-g16")
    free_offset: ClassVar[bool] = True

    bits: int = Field(ge=2, le=8)
    group: int = Field(default=16, gt=0)
    rows: int = Field(default=16, gt=0)
    second: int = Field(default=3, ge=1, le=8)

    @property
    def label(self) -> str:
        """`bilevel3-g16`; the other options are left out."""
        return f"bilevel{self.bits}-g{self.group}"

    @classmethod
    def parse(cls, text: str) -> Bilevel | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        return cls.model_validate({"bits": int(match[1]), "group": int(match[2])}) if match else None

    @property
    def group_columns(self) -> int:
        """See `Format.group_columns`."""
        return self.group

    @property
    def by_rows(self) -> bool:
        """See `Format.by_rows`: rows share the second level."""
        return False

    @property
    def tight(self) -> Mapping[str, tuple[int, int]]:
        """See `Format.tight`."""
        return {"scale": (self.second, 1), "zero": (self.second, 1), **dict.fromkeys(SECOND, (8, self.rows))}

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.arange(1 << self.bits, dtype=torch.float32)

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        groups = k // self.group
        per_row = k * self.bits + 2 * 8 * -(-groups * self.second // 8)
        return n * per_row + -(-n // self.rows) * groups * 4 * 16

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        size = max(1, CHUNK // w.shape[1] // self.rows) * self.rows
        parts = [self._fit(w[a : a + size], importance) for a in range(0, len(w), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit(self, w: Tensor, importance: Tensor | None) -> Params:
        groups, top = w.shape[1] // self.group, (1 << self.bits) - 1
        scale, offset = search.free_offset(w, importance, self.group, top)
        scale = torch.where(scale == 0, offset.abs(), scale)  # groups of one number
        x, weight = w.view(len(w), groups, -1), relative(importance, w.shape[1], groups).to(w.device).view(groups, -1)
        params = self._parts("scale", scale)
        stored = self._value("scale", params)
        inverse = torch.where(stored == 0, 0.0, 1.0 / torch.where(stored == 0, 1.0, stored))[..., None]
        zero = -(offset * inverse[..., 0])
        q = (x * inverse + zero[..., None]).round().clamp(0, top)
        zero = ((q - x * inverse) * weight).sum(2) / weight.sum(1)  # the best for these codes and the stored scale
        params |= self._parts("zero", zero)
        return params if self._alone and self.bits > 4 else self._nearby(x, weight, params)

    def _nearby(self, x: Tensor, weight: Tensor, params: Params) -> Params:
        """Of steps around the nearest, those that leave the least error: x [N, G, W], weight [G, W]."""
        least, best, top = None, dict(params), (1 << self.second) - 1
        for moves in sorted(product((-1, 0, 1), repeat=2), key=lambda pair: pair != (0, 0)):
            tried = dict(params)
            for name, move in zip(("scale", "zero"), moves, strict=True):
                tried[name] = (params[name].int() + move).clamp(0, top).to(torch.uint8)
            scale, offset = (p[..., None] for p in self.affine(tried))
            q = ((x - offset) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, (1 << self.bits) - 1)
            error = ((q * scale + offset - x).square() * weight).sum(2)
            better = error < (torch.inf if least is None else least)
            least = error if least is None else torch.where(better, error, least)
            best |= {name: torch.where(better, tried[name], best[name]) for name in ("scale", "zero")}
        return best

    def _parts(self, name: str, x: Tensor) -> Params:
        """Second level of some numbers, float32 [N, G]: codes uint8 [N, G], step and lowest value fp16 [N, G]."""
        n, rows, top = len(x), self.rows, (1 << self.second) - 1
        filled = torch.cat([x, x[-1:].expand(-n % rows, -1)])
        low, high = filled.view(-1, rows, x.shape[1]).aminmax(dim=1)
        low = round_scales(low, "fp16", self.label)
        step = round_scales((high - low.float()) / top, "fp16", self.label)
        step, low = (p.repeat_interleave(rows, 0)[:n] for p in (step, low))
        return {name: self._nearest(x, step, low), f"{name}_step": step, f"{name}_low": low}

    def _nearest(self, x: Tensor, step: Tensor, low: Tensor) -> Tensor:
        codes = (x - low.float()) / torch.where(step == 0, torch.inf, step.float())
        return codes.round().clamp(0, (1 << self.second) - 1).to(torch.uint8)

    def _value(self, name: str, params: Params) -> Tensor:
        """float32 [N, G]."""
        return params[name].float() * params[f"{name}_step"].float() + params[f"{name}_low"].float()

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        scale = self._value("scale", params)
        return scale, -scale * self._value("zero", params)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`; the second level stays."""
        codes = self._nearest(scale, params["scale_step"], params["scale_low"])
        moved = params | {"scale": codes}
        stored = self._value("scale", moved)
        zero = -offset / torch.where(stored == 0, torch.inf, stored)
        return moved | {"zero": self._nearest(zero, params["zero_step"], params["zero_low"])}

    def refit_weighted(self, params: Params, scale: Tensor, offset: Tensor, curvature: Tensor) -> Params:
        """See `Format.refit_weighted`: of all pairs of codes, group by group, the one that is best given the others."""
        count, groups = 1 << self.second, scale.shape[1]
        codes = torch.arange(count, device=scale.device, dtype=torch.uint8)
        present = self.affine(params)
        pull = torch.einsum("npq,nq->np", curvature, torch.cat([scale - present[0], offset - present[1]], 1))
        found = {name: params[name].clone() for name in ("scale", "zero")}
        for g in [*range(groups)] * SWEEPS:
            here = {name: p[:, g : g + 1] for name, p in (params | found).items()}
            grid = {name: p.expand(-1, count * count) for name, p in here.items()}
            grid["scale"] = codes.repeat_interleave(count).expand_as(grid["scale"])
            grid["zero"] = codes.repeat(count).expand_as(grid["zero"])
            s, o = (new - old for new, old in zip(self.affine(grid), self.affine(here), strict=True))
            bend = curvature[:, [g, g, groups + g], [g, groups + g, groups + g]]
            gain = 2 * (s * pull[:, g, None] + o * pull[:, groups + g, None])
            gain = gain - bend[:, :1] * s * s - 2 * bend[:, 1:2] * s * o - bend[:, 2:] * o * o
            most, at = gain.max(1, keepdim=True)
            move = most > 0
            for name, p in found.items():
                p[:, g : g + 1] = torch.where(move, grid[name].gather(1, at), p[:, g : g + 1])
            s, o = (torch.where(move, part.gather(1, at), 0.0) for part in (s, o))
            pull = pull - curvature[:, :, g] * s - curvature[:, :, groups + g] * o
        return params | found
