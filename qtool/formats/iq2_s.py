"""IQ2_S: vectors of 8 columns from 1024 entries, every sign free, 2.5625 bits per weight.

`w_hat = d * (2 s + 1) / 8 * level`, s of 4 bits per 16 columns. Block: d, the low bytes of 32 entries, 32 bytes of
signs, 8 bytes with the high 2 bits of four entries each, 8 bytes with two s each (82 bytes; `block_iq2_s` of
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


class IQ2_S(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 22
    block_bytes: ClassVar[int] = 82
    rule: ClassVar[ScaleRule] = ScaleRule(group=16, unit=0.125, top=15, delta=0.0, segment=16, low=0.026, high=0.09)
    signs: ClassVar[Literal["none", "free", "even"]] = "free"
    ggml: ClassVar[CodebookSearch] = CodebookSearch(reach=9, shells=1, least=1e-8, stretch=0.9875, flat=0.25)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        entries, negative = self.entries(codes)
        parts = [
            (entries & 255).to(torch.uint8).view(n, -1, 32),
            negative.view(n, -1, 32),
            fields_to_bytes((entries >> 8).view(n, -1, 4), 2, 1).view(n, -1, 8),
            fields_to_bytes(params["s"].view(n, -1, 2), 4, 1).view(n, -1, 8),
        ]
        return torch.cat([as_bytes(params["d"]), *parts], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        blocks = packed.reshape(n, -1, self.block_bytes)
        d, low, negative, high, scales = blocks.tensor_split((2, 34, 66, 74), dim=-1)
        entries = low.flatten(1).int() | bytes_to_fields(high.reshape(n, -1, 1), 2, 4).flatten(1).int() << 8
        s = bytes_to_fields(scales.reshape(n, -1, 1), 4, 2).flatten(1)
        return self.codes(entries, negative.flatten(1)), {"d": as_fp16(d), "s": s}
