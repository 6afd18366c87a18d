"""The classic block types of GGUF: 32 columns, a scale d and perhaps a minimum m, and codes of 4, 5 or 8 bits.

    Q4_0, Q5_0, Q8_0:  w_hat = d * (q - 2^(b-1))     d may be negative
    Q4_1, Q5_1:        w_hat = d * q + m

Parameters are in fp16 before the codes (https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, expand, too_wide
from qtool.formats._ggml import BlockFormat, as_fp16, fp16
from qtool.formats._scaled import Scaled
from qtool.formats.biased import Biased
from qtool.formats.int import Int
from qtool.numerics.ggml import search as ggml_search
from qtool.numerics.ggml.round import ends, round_blocks
from qtool.numerics.ggml.search import WEIGHTED, ScaleSearch
from qtool.numerics.grids.bits import from_planes, planes, stack_runs
from qtool.numerics.grids.minifloat import largest
from qtool.numerics.scales.block_search import EFFORT, Block, search_blocks

GATHER = 0x0102040810204080
"""A product with it has the lowest bits of eight bytes in its highest one."""


class Classic(BlockFormat):
    """Blocks of 32 columns with one scale, and perhaps a minimum.

    Attributes:
        bits: of a code.
        offset: True if a block has a minimum.
        ggml_range: ggml's own encoder divides a block's largest absolute value (or its range) by this.
    """

    columns: ClassVar[int] = 32
    bits: ClassVar[int]
    offset: ClassVar[bool] = False
    ggml_range: ClassVar[int]

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.columns

    @property
    def lowest(self) -> int:
        """The level of code 0."""
        return 0 if self.offset else -(1 << (self.bits - 1))

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.arange(self.lowest, self.lowest + (1 << self.bits), dtype=torch.float32)

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        d = params["d"].float()
        return d, params["m"].float() if self.offset else torch.zeros_like(d)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`."""
        return self.stored(scale, offset)

    def stored(self, d: Tensor, m: Tensor) -> Params:
        """Rounds to fp16. Raises NumericsError: too large for it."""
        stored = {"d": d, "m": m} if self.offset else {"d": d}
        return {name: fp16(values, self.label) for name, values in stored.items()}

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        if self.search == "ggml":
            return self.stored(*self.ggml_scales(w))
        if self.bits == 8 and self.search == "fast":  # ggml does not search there, which is hard to outrun
            return self.stored(*self.ggml_scales(w))
        lowest = np.float32(self.lowest)
        kind, effort = Block(lowest, lowest + np.float32((1 << self.bits) - 1), self.offset), EFFORT[self.search]
        if self._alone or (self.search == "fast" and not self.offset):  # ggml's takes a third of the time of `fast`
            return self.stored(*search_blocks(w, importance, kind, effort))
        theirs = self.ggml_choice(w, importance)
        found = self.stored(*search_blocks(w, importance, kind, effort, theirs))
        return self.no_worse(found, self.stored(*theirs), w, importance)

    def ggml_choice(self, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """(d, m) of ggml's encoder, which has an importance matrix or not, before they are rounded to fp16."""
        if importance is None or self.bits == 8:
            return self.ggml_scales(w)
        levels = np.float32((1 << self.bits) - 1 if self.offset else -self.lowest)
        kind = ScaleSearch(self.columns, levels, np.float32(0), self.offset, np.float32(1), WEIGHTED, np.float32(0))
        d, minimum, _, _ = ggml_search.ggml_scales(w, self.usable(importance), kind, w.shape[1])
        return d, -minimum

    def ggml_scales(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(d, m) of ggml's encoder before they are rounded to fp16, float32 [N, G] each."""
        if self.ggml_range > 0 and not self.offset:
            d = largest(w, w.shape[1] // self.columns) / self.ggml_range
            return d, torch.zeros_like(d)
        low, high, extreme = ends(w, self.columns)
        if self.offset:
            return (high - low) / self.ggml_range, low
        return extreme / self.ggml_range, torch.zeros_like(low)

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`. ggml rounds against scales not yet in fp16; so do we, where `params` are its own."""
        if self.search == "ggml" and w.shape[1] % self.columns == 0:
            d, m = self.ggml_scales(w)
            own = self.stored(d, m)
            if all(torch.equal(own[name], params[name]) for name in own):
                return round_blocks(w, d, m, self.lowest, self.bits)
        return super().snap(w, params)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`. Byte j holds column j in its low and column j + 16 in its high nibble."""
        q = codes.reshape(-1, self.columns)
        packed = torch.empty(len(q), self.block_bytes, dtype=torch.uint8)
        for place, values in enumerate(params.values()):
            packed.view(torch.float16)[:, place] = values.reshape(-1)
        body = 2 * len(params)
        if self.bits == 8:
            stack_runs(q, (1,), self.columns, flip=128, out=packed[:, body:])
        else:
            planes(q, 4, 16, out=packed[:, -16:])
        if self.bits == 5:
            packed[:, body : body + 4] = (q >> 4).view(torch.int64) * GATHER >> 56  # the fifth bits
        return packed.view(len(codes), -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = packed.shape[0]
        blocks = packed.reshape(n, -1, self.block_bytes)
        names = ("d", "m") if self.offset else ("d",)
        params = {name: as_fp16(blocks[..., 2 * i : 2 * i + 2]) for i, name in enumerate(names)}
        body = blocks[..., 2 * len(names) :]
        if self.bits == 8:
            return (body ^ 128).reshape(n, -1), params
        q = from_planes(body[..., -16:], 4, 16)
        if self.bits == 5:
            q |= from_planes(body[..., :4], 1, 1) << 4
        return q.reshape(n, -1), params

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`."""
        if isinstance(fmt, type(self)):
            return None
        integers = isinstance(fmt, Int | Biased | Classic) or (isinstance(fmt, Scaled) and fmt.grid.step == 1)
        if not integers or (fmt.free_offset and not self.offset):
            return f"{self.label} holds no {fmt.label}"
        if fmt.group_columns is not None and fmt.group_columns % self.columns:
            return f"{self.label} needs groups that are a multiple of {self.columns} columns, not {fmt.group_columns}"
        zeros = isinstance(fmt, Int) and not fmt.symmetric
        if fmt.code_bits + (zeros and not self.offset) > self.bits:
            return too_wide(fmt, zeros, self)
        return None

    def hold(self, quantized: Quantized) -> Quantized | str:
        """See `Format.hold`. An integer zero point becomes part of the codes, or of the minimum."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        reason = self.may_hold(fmt) or self.misfit(codes.shape[1])
        if reason or isinstance(fmt, type(self)):
            return reason or quantized
        scale, offset = (expand(p, codes.shape[1] // self.columns) for p in fmt.affine(params))
        lowest_value = offset + float(fmt.levels()[0]) * scale
        if self.offset:
            stored = {"d": scale.half(), "m": lowest_value.half()}
            exact = torch.equal(stored["m"].float(), lowest_value)
        else:
            stored = {"d": scale.half()}
            shift = torch.where(scale == 0, self.lowest, (lowest_value / scale).round())
            exact = torch.equal(shift * scale, lowest_value)
            steps = (shift - self.lowest).to(torch.uint8).unsqueeze(-1)
            codes = (codes.reshape(*shift.shape, self.columns) + steps).reshape(codes.shape)
        if not torch.equal(stored["d"].float(), scale):
            return "some scales are not exact in fp16"
        return Quantized(codes, stored, self) if exact else "some zero points times their scales are not exact in fp16"
