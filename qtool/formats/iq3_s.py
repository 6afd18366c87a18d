"""IQ3_S: vectors of 4 columns from 512 entries, every sign free, 3.4375 bits per weight.

`w_hat = d * (2 s + 1) * level`, s of 4 bits per 32 columns. Block: d, the low bytes of 64 entries, 8 bytes with the
ninth bits of eight entries each, 32 bytes of signs, 4 bytes with two s each (110 bytes; `block_iq3_s` of
ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._ggml import as_bytes, as_fp16
from qtool.formats._vector import Vector, bytes_to_fields, fields_to_bytes
from qtool.numerics.codebooks.scale_rule import ScaleRule
from qtool.numerics.ggml.codebook import CodebookSearch


class IQ3_S(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 21
    block_bytes: ClassVar[int] = 110
    rule: ClassVar[ScaleRule] = ScaleRule(group=32, unit=1.0, top=15, delta=0.0, segment=32, low=0.07, high=0.6)
    signs: ClassVar[Literal["none", "free", "even"]] = "free"
    span: ClassVar[int] = 4
    ggml: ClassVar[CodebookSearch] = CodebookSearch(reach=9, step=0.2, shells=3, again=True, least=0.0, stretch=1.033)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        entries, negative = self.entries(codes)
        parts = [
            (entries & 255).to(torch.uint8).view(n, -1, 64),
            fields_to_bytes((entries >> 8).view(n, -1, 8), 1, 1).view(n, -1, 8),
            negative.view(n, -1, 32),
            fields_to_bytes(params["s"].view(n, -1, 2), 4, 1).view(n, -1, 4),
        ]
        return torch.cat([as_bytes(params["d"]), *parts], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        blocks = packed.reshape(n, -1, self.block_bytes)
        d, low, high, negative, scales = blocks.tensor_split((2, 66, 74, 106), dim=-1)
        entries = low.flatten(1).int() | bytes_to_fields(high.reshape(n, -1, 1), 1, 8).flatten(1).int() << 8
        s = bytes_to_fields(scales.reshape(n, -1, 1), 4, 2).flatten(1)
        return self.codes(entries, negative.flatten(1)), {"d": as_fp16(d), "s": s}
