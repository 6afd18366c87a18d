"""IQ2_XS: vectors of 8 columns from 512 entries, an even number of minus signs, 2.3125 bits per weight.

`w_hat = d * (2 s + 1) / 8 * level`, s of 4 bits per 16 columns. Block: d, 32 words of 9 bits of entry and 7 signs (the
eighth makes their number even), 8 bytes with two s each (74 bytes; `block_iq2_xs` of ggml-common.h,
https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._ggml import as_bytes, as_fp16
from qtool.formats._vector import Vector, bytes_to_fields, eighth_sign, fields_to_bytes
from qtool.numerics.codebooks.scale_rule import ScaleRule
from qtool.numerics.ggml.codebook import CodebookSearch


class IQ2_XS(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 17
    block_bytes: ClassVar[int] = 74
    rule: ClassVar[ScaleRule] = ScaleRule(group=16, unit=0.125, top=15, delta=0.0, segment=16, low=0.025, high=0.09)
    signs: ClassVar[Literal["none", "free", "even"]] = "even"
    ggml: ClassVar[CodebookSearch] = CodebookSearch(
        reach=9, even=True, shells=2, least=1e-15, spread=1.0, required=True
    )

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        entries, negative = self.entries(codes)
        words = fields_to_bytes(torch.stack([entries, negative & 127], dim=-1), 9, 2).view(n, -1, 64)
        scales = fields_to_bytes(params["s"].view(n, -1, 2), 4, 1).view(n, -1, 8)
        return torch.cat([as_bytes(params["d"]), words, scales], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        d, words, scales = packed.reshape(n, -1, self.block_bytes).tensor_split((2, 66), dim=-1)
        entries, negative = bytes_to_fields(words.reshape(n, -1, 2), 9, 2).unbind(-1)
        s = bytes_to_fields(scales.reshape(n, -1, 1), 4, 2).flatten(1)
        return self.codes(entries, eighth_sign(negative.to(torch.uint8))), {"d": as_fp16(d), "s": s}
