"""IQ4_NL: 4-bit codes into a table of uneven levels, one fp16 scale per 32 columns, 4.5 bits: `w_hat = d * T[q]`.

Block: d, then 16 bytes of nibbles (18 bytes; `block_iq4_nl` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._ggml import as_bytes, as_fp16
from qtool.formats._iq4 import IQ4
from qtool.numerics.grids.bits import from_planes, planes


class IQ4_NL(IQ4):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 20
    columns: ClassVar[int] = 32
    block_bytes: ClassVar[int] = 18

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        d = params["d"].float()
        return d, torch.zeros_like(d)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`."""
        return self.stored(scale, torch.ones_like(scale))

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        body = planes(codes.reshape(len(codes), -1, 32), 4, 16)
        return torch.cat([as_bytes(params["d"]), body], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        blocks = packed.reshape(len(packed), -1, self.block_bytes)
        return from_planes(blocks[..., 2:], 4, 16).flatten(1), {"d": as_fp16(blocks[..., :2])}
