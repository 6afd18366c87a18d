"""What TQ1_0 and TQ2_0 share: levels -1, 0, 1 and one fp16 scale per 256 columns, `w_hat = d * (q - 1)`.

ggml's encoder takes the largest absolute value as d, which is right for models that were trained with ternary weights
and keeps little of others. `search: fast` and more find the d of least error; "default" and "thorough" are exact.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, alike, expand
from qtool.formats._ggml import BlockFormat, fp16
from qtool.formats.int import Int
from qtool.numerics.scales.table_search import block_weights
from qtool.numerics.scales.ternary_search import ternary_scales


class Ternary(BlockFormat):
    """Blocks of 256 columns with ternary codes."""

    columns: ClassVar[int] = 256
    fallback: ClassVar[str | None] = "q4_0"
    cheap: ClassVar[bool] = True

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.columns

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.tensor([-1.0, 0.0, 1.0])

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        d = params["d"].float()
        return d, torch.zeros_like(d)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`."""
        return self.stored(scale)

    def stored(self, d: Tensor) -> Params:
        """Rounds to fp16. Raises NumericsError: too large for it."""
        return {"d": fp16(d, self.label)}

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        if self.search == "ggml":
            return self.stored(self._absmax(w))
        weight = block_weights(importance, w.shape[1], self.columns)
        found = self.stored(ternary_scales(w, weight, self.columns, self.search != "fast"))
        if self._alone or self.search == "fast":
            return found
        return self.no_worse(found, self.stored(self._absmax(w)), w, importance)

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`. ggml rounds against scales not yet in fp16; so do we, where `params` are its own."""
        if self.search == "ggml":
            d = self._absmax(w)
            if torch.equal(d.half(), params["d"]):
                x = w * expand(torch.where(d == 0, 0.0, 1.0 / torch.where(d == 0, 1.0, d)), w.shape[1])
                return (x.sign() * (x.abs() >= 0.5) + 1).to(torch.uint8)
        return super().snap(w, params, importance)

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`: integers of two bits, since their lowest level may be unused."""
        if alike(self, fmt):
            return None
        if not isinstance(fmt, Int) or fmt.bits != 2 or not fmt.symmetric:
            return f"{self.label} holds no {fmt.label}"
        if fmt.group_columns is not None and fmt.group_columns % self.columns:
            return f"{self.label} needs groups that are a multiple of {self.columns} columns, not {fmt.group_columns}"
        return None

    def hold(self, quantized: Quantized) -> Quantized | str:
        """See `Format.hold`."""
        codes, fmt = quantized.codes, quantized.format
        reason = self.may_hold(fmt) or self.misfit(codes.shape[1])
        if reason or alike(self, fmt):
            return reason or quantized
        scale = expand(fmt.affine(quantized.params)[0], codes.shape[1] // self.columns)
        if not bool(codes.all()):
            return f"{self.label} has three levels, and all four of {fmt.label} are used"
        if not torch.equal(scale.half().float(), scale):
            return "some scales are not exact in fp16"
        return Quantized(codes - 1, {"d": scale.half()}, self)

    def _absmax(self, w: Tensor) -> Tensor:
        return w.view(len(w), -1, self.columns).abs().amax(-1)
