"""Q3_K: 3-bit codes, signed 6-bit scale per 16 columns, 3.4375 bits per weight: `w_hat = d * sc * (q - 4)`.

Super-block of 256 columns: 32 bytes with the high bits of the codes, 64 with their low 2 bits, 12 with the scales plus
32, d (110 bytes; `block_q3_K` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._kquant import KQuant
from qtool.numerics.ggml.groups import Sweep, sweep_of
from qtool.numerics.grids.bits import from_planes, planes


class Q3_K(KQuant):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 11
    block_bytes: ClassVar[int] = 110
    fallback: ClassVar[str | None] = "q4_0"
    bits: ClassVar[int] = 3
    scale_bits: ClassVar[int] = 6
    ggml_spread: ClassVar[float] = 2
    ggml_sweep: ClassVar[Sweep] = sweep_of(0, 0)

    def pack_block(self, q: Tensor, fields: Params) -> list[Tensor]:
        """See `KQuant.pack_block`. Scale j has its low 4 bits in byte j % 8 and its high 2 bits in byte 8 + j % 4."""
        scales = fields["sc"] + 32
        packed = torch.cat([planes(scales, 4, 8), planes(scales, 2, 4, shift=4)], dim=-1)
        return [planes(q, 1, shift=2), planes(q, 2), packed, fields["d"]]

    def unpack_block(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """See `KQuant.unpack_block`."""
        high, low, low_scales, high_scales, d = blocks.tensor_split((32, 96, 104, 108), dim=-1)
        scales = from_planes(low_scales, 4, 8) | from_planes(high_scales, 2, 4) << 4
        return from_planes(low, 2) | from_planes(high, 1) << 2, {"d": d, "sc": scales - 32}
