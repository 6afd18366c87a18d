"""IQ1_S: vectors of 8 columns from 2048 entries of -1, 0, 1, shifted by 1/8 up or down, 1.5625 bits per weight.

`w_hat = d * (2 s + 1) * (level + shift)`, s of 3 bits and the shift per 32 columns. Block: d, the low bytes of 32
entries, 8 words of 4 times the high 3 bits of an entry, s, and a bit that is set where the shift is down (50 bytes;
`block_iq1_s` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
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


class IQ1_S(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 19
    block_bytes: ClassVar[int] = 50
    rule: ClassVar[ScaleRule] = ScaleRule(group=32, unit=1.0, top=7, delta=0.125, segment=32, low=0.92, high=2.8)
    signs: ClassVar[Literal["none", "free", "even"]] = "none"
    ggml: ClassVar[TernarySearch] = TernarySearch(least=1e-12, stretch=1.125, required=True)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        entries, _ = self.entries(codes)
        last = params["s"] | params["minus"] << 3
        words = torch.cat([(entries >> 8).view(n, -1, 4), last[..., None]], dim=-1)
        body = [(entries & 255).to(torch.uint8).view(n, -1, 32), fields_to_bytes(words, 3, 2).view(n, -1, 16)]
        return torch.cat([as_bytes(params["d"]), *body], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        d, low, words = packed.reshape(n, -1, self.block_bytes).tensor_split((2, 34), dim=-1)
        fields = bytes_to_fields(words.reshape(n, -1, 2), 3, 6)
        entries = low.flatten(1).int() | fields[..., :4].flatten(1).int() << 8
        return self.codes(entries, entries), {"d": as_fp16(d), "s": fields[..., 4], "minus": fields[..., 5]}
