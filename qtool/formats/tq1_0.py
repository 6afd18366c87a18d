"""TQ1_0: levels -1, 0, 1 and one fp16 scale per 256 columns, five codes to a byte, 1.6875 bits per weight.

Block: 32 bytes of five codes each, 32 columns apart; 16 bytes, 16 columns apart; 4 bytes of four codes, 4 columns
apart; d (54 bytes; `block_tq1_0` of ggml-common.h, https://github.com/ggml-org/llama.cpp). A byte is v * 256 / 243
rounded up, v the codes as base-3 digits (a missing fifth counts as 0), so that multiplications by powers of 3 bring
each digit to the top of the byte.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._ggml import as_fp16
from qtool.formats._ternary import Ternary
from qtool.numerics.grids.bits import stack_runs

PARTS = ((0, 160, 32, 5), (160, 240, 16, 5), (240, 256, 4, 4))
"""A block's three parts: the columns where they begin and end, how far apart those of a byte are, and how many."""
BYTE_CUTS = (32, 48, 52)
PLACES = (81, 27, 9, 3, 1)
POWERS = torch.tensor([[1], [3], [9], [27], [81]], dtype=torch.int16)
BYTES = ((torch.arange(256) * 256 + 242) // 243).clamp(max=255).to(torch.uint8)


class TQ1_0(Ternary):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 34
    block_bytes: ClassVar[int] = 54

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        q = codes.reshape(-1, 256)
        packed = torch.empty(len(q), self.block_bytes, dtype=torch.uint8)
        outs = packed.tensor_split(BYTE_CUTS, dim=1)
        for (start, stop, width, count), out in zip(PARTS, outs, strict=False):
            stack_runs(q[:, start:stop], PLACES[:count], width, table=BYTES, out=out)
        packed.view(torch.float16)[:, -1] = params["d"].reshape(-1)
        return packed.view(len(codes), -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`. Bytes that `pack` never writes are read as ggml reads them."""
        *body, d = packed.reshape(len(packed), -1, self.block_bytes).tensor_split(BYTE_CUTS, dim=-1)
        codes = []
        for part, (*_, count) in zip(body, PARTS, strict=True):
            shifted = (part[..., None, :].short() * POWERS[:count]) & 255
            codes.append((shifted * 3 >> 8).to(torch.uint8).flatten(2))
        return torch.cat(codes, dim=-1).flatten(1), {"d": as_fp16(d)}
