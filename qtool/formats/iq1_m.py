"""IQ1_M: vectors of 8 columns from 2048 entries of -1, 0, 1, each shifted by 1/8 up or down, 1.75 bits per weight.

`w_hat = d * (2 s + 1) * (level + shift)`, s of 3 bits per 16 columns, a shift per 8. Block: the low bytes of 32
entries, 16 bytes with the high 3 bits of two entries and their shifts, 4 words with four s and 4 bits of d each (56
bytes; `block_iq1_m` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._ggml import as_bytes, as_fp16
from qtool.formats._vector import Vector, bytes_to_fields, fields_to_bytes
from qtool.numerics.codebooks.scale_rule import ScaleRule
from qtool.numerics.ggml.ternary import TernarySearch


class IQ1_M(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 29
    block_bytes: ClassVar[int] = 56
    rule: ClassVar[ScaleRule] = ScaleRule(group=16, unit=1.0, top=7, delta=0.125, segment=8, low=0.85, high=3.2)
    signs: ClassVar[Literal["none", "free", "even"]] = "none"
    ggml: ClassVar[TernarySearch] = TernarySearch(least=1e-7, stretch=1.1125, refitted=True)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        entries, _ = self.entries(codes)
        high = (entries >> 8).to(torch.uint8) | params["minus"] << 3
        d = bytes_to_fields(as_bytes(params["d"]), 4, 4)[..., None]
        scales = torch.cat([params["s"].view(n, -1, 4, 4), d], dim=-1)
        body = [
            (entries & 255).to(torch.uint8).view(n, -1, 32),
            fields_to_bytes(high.view(n, -1, 2), 4, 1).view(n, -1, 16),
            fields_to_bytes(scales, 3, 2).flatten(2),
        ]
        return torch.cat(body, dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        low, high, scales = packed.reshape(n, -1, self.block_bytes).tensor_split((32, 48), dim=-1)
        nibbles = bytes_to_fields(high.reshape(n, -1, 1), 4, 2).flatten(1)
        entries = low.flatten(1).int() | (nibbles & 7).int() << 8
        words = scales.reshape(n, -1, 4, 2)
        s, d = bytes_to_fields(words, 3, 4).flatten(1), fields_to_bytes(words[..., 1] >> 4, 4, 2)
        return self.codes(entries, entries), {"d": as_fp16(d), "s": s, "minus": nibbles >> 3}
