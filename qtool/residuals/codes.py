"""More codes beside the codes: what rounding left of all, or of some groups or rows, rounded once more.

    w = w_hat + second        second: a matrix in another format, zero where nothing is chosen

    chosen   uint8 [N, ceil(U / 8)]    where units are chosen: bit u of a row, lowest first; absent with all of them
    codes    uint8 [M, ceil(P b / 8)]  of the chosen units, row after row, packed to b bits
    NAME     [M, entries]              parameters of the format

A unit is a group of P columns, or a whole row (P = K). So are planes of trits (PTQTP,
https://arxiv.org/abs/2509.16989) and of bits (DB-LLM, https://arxiv.org/abs/2402.11960), groups of 4 bits among groups
of 2 (https://arxiv.org/abs/2311.16442), rows of 8 bits among rows of 4 (MixLLM, https://arxiv.org/abs/2412.14590), and
4 bits nested in 8 (after Double Rounding, https://arxiv.org/abs/2502.01199): a reader that leaves the second codes away
has the first ones.

Shape letters: U units of a row (K / P), M chosen units of a matrix, b bits of a code.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats._base import Params, Quantized, entries
from qtool.formats._spelling import WeightsField
from qtool.numerics.grids.bits import pack, unpack
from qtool.numerics.solving.planes import pair_codes, pair_scales
from qtool.residuals._base import Infos, Residual, Tensors, cost
from qtool.stats._base import Statistic
from qtool.stats.gram import Gram

MOST_PAIRS = 64
"""Pairs of levels that are compared for every weight."""
STARTS = ((1.5, 0.5), (1.0, 0.35), (1.9, -0.9), (1.4, -0.65), (-1.9, 0.9), (-1.4, 0.65))
"""Scales that a joint search begins from, over the root mean square: one a third of the other for trits, minus half of
it for bits."""


class Codes(Residual):
    """A second matrix of codes.

    Attributes:
        format: of the second codes.
        share: of the units that have some; 1: all of them.
        unit: what is chosen where not all are: "row", or so many columns of one.
        sensitive: true chooses the units that outputs miss most, by the Gram matrix of the inputs; false those with
            the largest error.
        joint: turns that find first and second codes of small tables together, in place of one behind the other.
    """

    format: WeightsField = Field("ternary-g64", validate_default=True)
    share: float = Field(1.0, gt=0, le=1)
    unit: Annotated[int, Field(gt=0)] | Literal["row"] = "row"
    sensitive: bool = True
    joint: int = Field(0, ge=0, le=1000)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Sizes of inputs, to choose with."""
        return frozenset({Gram}) if self.sensitive and self.share < 1 else frozenset()

    def width(self, k: int) -> int:
        """P."""
        return k if self.unit == "row" or self.share == 1 else self.unit

    def count(self, n: int, k: int) -> int:
        """M."""
        return max(1, round(self.share * n * (k // self.width(k))))

    def misfit(self, n: int, k: int) -> str | None:
        """See `Residual.misfit`."""
        if k % self.width(k):
            return f"rows of {k} columns are not divisible into units of {self.unit}"
        return self.format.misfit(self.width(k))

    def infos(self, n: int, k: int) -> Infos:
        """See `Residual.infos`."""
        m, width = self.count(n, k), self.width(k)
        found: Infos = {"codes": ((m, (width * self.format.code_bits + 7) // 8), torch.uint8)}
        found |= {name: ((m, count), dtype) for name, (count, dtype) in entries(self.format, width).items()}
        if self.share < 1:
            found["chosen"] = ((n, (k // width + 7) // 8), torch.uint8)
        return found

    def fit(self, error: Tensor, gram: Tensor | None) -> Tensors:
        """See `Residual.fit`."""
        n, k = error.shape
        units = error.reshape(-1, self.width(k))
        if self.share == 1:
            return self.stored(units)
        best = cost(error, gram).view(units.shape).sum(1).topk(self.count(n, k), sorted=False).indices
        chosen = torch.zeros(len(units), dtype=torch.uint8, device=error.device)
        chosen[best] = 1
        return self.stored(units[chosen.bool()]) | {"chosen": pack(chosen.view(n, -1), 1)}

    def jointly(self, w: Tensor, first: Quantized) -> tuple[Quantized, Tensors] | None:
        """See `Residual.jointly`."""
        fmts, groups = (first.format, self.format), w.shape[1] // (self.format.group_columns or w.shape[1])
        levels = fmts[0].levels(), fmts[1].levels()
        alike = self.share == 1 and fmts[0].group_columns == fmts[1].group_columns
        if not (self.joint and alike and len(levels[0]) * len(levels[1]) <= MOST_PAIRS):
            return None
        x = w.reshape(len(w) * groups, -1)
        scales = pair_scales(x, levels, STARTS, self.joint).view(len(w), groups, 2)
        zeros, starts = torch.zeros_like(scales[..., 0]), (first.params, self.format.fit(w))
        params = [f.refit(p, scales[..., i], zeros) for i, (f, p) in enumerate(zip(fmts, starts, strict=True))]
        stored = torch.stack([f.affine(p)[0] for f, p in zip(fmts, params, strict=True)], dim=-1)
        codes = pair_codes(x, stored.view(-1, 2), levels).view(2, *w.shape)
        return Quantized(codes[0], params[0], fmts[0]), {"codes": pack(codes[1], self.format.code_bits), **params[1]}

    def stored(self, units: Tensor) -> dict[str, Tensor]:
        """Some units in the format, float32 [M, P]."""
        params = self.format.fit(units)
        return {"codes": pack(self.format.snap(units, params), self.format.code_bits), **params}

    def decode(self, tensors: Tensors, width: int) -> Tensor:
        """The chosen units, float32 [M, P]."""
        if not len(tensors["codes"]):
            return tensors["codes"].new_empty((0, width), dtype=torch.float32)
        params: Params = {name: t for name, t in tensors.items() if name not in ("codes", "chosen")}
        return Quantized(unpack(tensors["codes"], self.format.code_bits, width), params, self.format).decode()

    def apply(self, w_hat: Tensor, tensors: Tensors) -> Tensor:
        """See `Residual.apply`."""
        width = self.width(w_hat.shape[1])
        second = self.decode(tensors, width).to(w_hat.device)
        if self.share == 1:
            return w_hat + second.view(w_hat.shape)
        chosen = unpack(tensors["chosen"], 1, w_hat.shape[1] // width).flatten().bool()
        corrected = w_hat.clone().view(-1, width)
        corrected[chosen.to(w_hat.device)] += second
        return corrected.view(w_hat.shape)

    def rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        """See `Residual.rows`."""
        if self.share == 1:
            return {name: t[start:stop] for name, t in tensors.items()}
        first = ones(tensors["chosen"][:start])
        last = first + ones(tensors["chosen"][start:stop])
        own = {name: t[first:last] for name, t in tensors.items() if name != "chosen"}
        return own | {"chosen": tensors["chosen"][start:stop]}

    def check(self, tensors: Tensors, n: int, k: int) -> None:
        """See `Residual.check`."""
        width = self.width(k)
        if self.share < 1 and (found := ones(pack(unpack(tensors["chosen"], 1, k // width), 1))) != self.count(n, k):
            raise ValueError(f"chosen: wanted {self.count(n, k)} units, found {found}")
        if (highest := int(unpack(tensors["codes"], self.format.code_bits, width).max())) >= len(self.format.levels()):
            raise ValueError(f"codes: wanted codes below {len(self.format.levels())}, found {highest}")


def ones(packed: Tensor) -> int:
    """Bits that are set, of uint8 [N, any]."""
    return int((packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).sum())
