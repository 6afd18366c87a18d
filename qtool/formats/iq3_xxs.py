"""IQ3_XXS: vectors of 4 columns from 256 entries, an even number of minus signs per 8, 3.0625 bits per weight.

`w_hat = d * (2 s + 1) / 4 * level`, s of 4 bits per 32 columns. Block: d, 64 bytes of entries, then for each 32 columns
a word of 4 times 7 signs (the eighth makes their number even) and s (98 bytes; `block_iq3_xxs` of ggml-common.h,
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


class IQ3_XXS(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 18
    block_bytes: ClassVar[int] = 98
    rule: ClassVar[ScaleRule] = ScaleRule(group=32, unit=0.25, top=15, delta=0.0, segment=32, low=0.017, high=0.15)
    signs: ClassVar[Literal["none", "free", "even"]] = "even"
    ggml: ClassVar[CodebookSearch] = CodebookSearch(reach=15, step=0.2, even=True, shells=2, least=1e-8, stretch=1.0125)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        entries, negative = self.entries(codes)
        words = torch.cat([(negative & 127).view(n, -1, 4), params["s"][..., None]], dim=-1)
        body = [entries.to(torch.uint8).view(n, -1, 64), fields_to_bytes(words, 7, 4).view(n, -1, 32)]
        return torch.cat([as_bytes(params["d"]), *body], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        d, entries, words = packed.reshape(n, -1, self.block_bytes).tensor_split((2, 66), dim=-1)
        fields = bytes_to_fields(words.reshape(n, -1, 4), 7, 5)
        codes = self.codes(entries.flatten(1), eighth_sign(fields[..., :4].flatten(1)))
        return codes, {"d": as_fp16(d), "s": fields[..., 4]}
