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
from qtool.formats._ternary import Ternary

CUTS, BYTE_CUTS, DIGITS = (160, 240), (32, 48, 52), (5, 5, 4)
"""A block's three parts: the columns and the bytes where they end, and the codes in a byte."""
PLACES = torch.tensor([[81], [27], [9], [3], [1]], dtype=torch.int16)


class TQ1_0(Ternary):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 34
    block_bytes: ClassVar[int] = 54

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        blocks = codes.view(len(codes), -1, 256)
        parts = []
        for part, digits in zip(blocks.tensor_split(CUTS, dim=-1), DIGITS, strict=True):
            fields = part.reshape(*blocks.shape[:2], digits, -1).short()
            values = (fields * PLACES[:digits]).sum(2, dtype=torch.int32)
            parts.append(((values * 256 + 242) // 243).to(torch.uint8))
        parts.append(params["d"].contiguous().view(torch.uint8).view(*blocks.shape[:2], 2))
        return torch.cat(parts, dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`. Bytes that `pack` never writes are read as ggml reads them."""
        *body, d = packed.reshape(len(packed), -1, self.block_bytes).tensor_split(BYTE_CUTS, dim=-1)
        codes = []
        for part, digits in zip(body, DIGITS, strict=True):
            shifted = (part[..., None, :].short() * PLACES.flip(0)[:digits]) & 255
            codes.append((shifted * 3 >> 8).to(torch.uint8).flatten(2))
        return torch.cat(codes, dim=-1).flatten(1), {"d": d.contiguous().view(torch.float16).squeeze(-1)}
