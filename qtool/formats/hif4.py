"""HiF4: 64 columns share a float of 8 bits, each 8 of them one bit of an exponent, and each 4 another: 4.5 bits.

    w_hat = b * 2^(e + f) * v        v = -1.75, -1.5, ..., 1.75

b is an unsigned float with 6 exponent bits (bias 48) and 2 mantissa bits, e a bit per 8 columns, f a bit per 4
(https://arxiv.org/abs/2602.11287). `search: minmax` is the format's rule: the largest weight lands on 7 b, and a bit is
set where what it covers needs it. By default b is the one of least error among some around, all bits told the same way.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from qtool.formats._base import Format, Params
from qtool.numerics.checks import refuse_large
from qtool.numerics.grids.three_level import best_blocks
from qtool.numerics.scales.search import relative

BIAS, MANTISSA = 48, 4
LARGEST = 254
"""The last code of b that is a number, 1.5 * 2^15."""
TRIED = tuple(range(-8, 3))
"""Codes of b that are tried, from the one that covers the largest weight on."""
BITS = torch.arange(8, dtype=torch.uint8)


class HiF4(Format):
    """Three levels of scales.

    Attributes:
        search: "minmax", or by the error that is left.
    """

    search: Literal["minmax", "default"] = "default"

    @property
    def label(self) -> str:
        """`hif4`, or `hif4-minmax`."""
        return "hif4" + ("" if self.search == "default" else "-minmax")

    @classmethod
    def parse(cls, text: str) -> HiF4 | None:
        """See `Format.parse`."""
        found: dict[str, Literal["minmax", "default"]] = {"hif4": "default", "hif4-minmax": "minmax"}
        return cls(search=found[text]) if text in found else None

    def at_run_time(self) -> Self:
        """See `Format.at_run_time`."""
        return self.model_copy(update={"search": "minmax"})

    @property
    def group_columns(self) -> int:
        """See `Format.group_columns`."""
        return 4

    @property
    def block_columns(self) -> int:
        """See `Format.block_columns`."""
        return 64

    def levels(self) -> Tensor:
        """See `Format.levels`: in quarters, so that they are integers."""
        return torch.arange(-7.0, 8.0)

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        return n * k * 4 + n * (k // 64) * 32

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        n = len(params["base"])
        eighths, quarters = (unpacked(params[name]).view(n, -1) for name in ("eights", "fours"))
        base = value(params["base"]).repeat_interleave(16, 1) / 4
        scale = torch.ldexp(base, eighths.repeat_interleave(2, 1).int() + quarters.int())
        return scale, torch.zeros_like(scale)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`. Raises NumericsError: a weight is too large, or not finite."""
        ends = w.abs().view(len(w), -1, 64).amax(2)
        if not bool((ends <= 7 * float(value(torch.tensor(LARGEST)))).all()):
            refuse_large(float(ends.max()), 7 * float(value(torch.tensor(LARGEST))))
        base = nearest(ends / 7)
        if self.search == "minmax":
            return self._covering(w, base)
        weight = relative(importance, w.shape[1], w.shape[1] // 64)
        codes, eights, fours = best_blocks(w, weight, base, value(torch.arange(LARGEST + 1)), TRIED)
        return {"base": codes, "eights": eights, "fours": fours}

    def _covering(self, w: Tensor, base: Tensor) -> Params:
        """The format's own rule for the bits."""
        sizes = w.abs().view(*base.shape, 8, 2, 4).amax(4) / value(base)[..., None, None]
        eights = sizes.amax(3) >= 4
        fours = torch.ldexp(sizes, -eights.int()[..., None]) >= 2
        return {"base": base, "eights": as_bytes(eights), "fours": as_bytes(fours)}

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`: b moves, bits stay."""
        steps = self.affine(params)[0] / value(params["base"]).repeat_interleave(16, 1)
        wanted, steps = (p.view(len(scale), -1, 16) for p in (scale, steps))
        b = (wanted * steps).sum(2) / steps.square().sum(2)
        return params | {"base": torch.where(b > 0, nearest(b), params["base"])}


def value(codes: Tensor) -> Tensor:
    """Numbers that codes of b stand for: uint8 -> float32."""
    codes = codes.int()
    return torch.ldexp((MANTISSA + codes % MANTISSA) / MANTISSA, codes // MANTISSA - BIAS)


def nearest(x: Tensor) -> Tensor:
    """Codes of the numbers nearest to x >= 0, at most the largest: float32 -> uint8; a tie goes to the even code."""
    fraction, exponent = torch.frexp(x)  # x = fraction * 2^exponent, from 1/2 on
    codes = (exponent - 1 + BIAS) * MANTISSA + (2 * MANTISSA * fraction).round() - MANTISSA
    return torch.where(x > 0, codes, 0).clamp(0, LARGEST).to(torch.uint8)


def as_bytes(bits: Tensor) -> Tensor:
    """Bits in bytes, lowest first: bool [N, ...] -> uint8 [N, B]."""
    places = bits.reshape(len(bits), -1, 8).to(torch.uint8) << BITS.to(bits.device)
    return places.sum(2, dtype=torch.uint8)


def unpacked(packed: Tensor) -> Tensor:
    """Bits of bytes, lowest first: uint8 [N, B] -> uint8 [N, B, 8]."""
    return packed[..., None] >> BITS.to(packed.device) & 1
