"""IQ2_XXS: vectors of 8 columns from 256 entries, an even number of minus signs, 2.0625 bits per weight.

`w_hat = d * (2 s + 1) / 8 * level`, s of 4 bits per 32 columns. Block: d, then for each 32 columns 4 bytes of entries
and a word of 4 times 7 signs (the eighth makes their number even) and s (66 bytes; `block_iq2_xxs` of ggml-common.h,
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


class IQ2_XXS(Vector):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 16
    block_bytes: ClassVar[int] = 66
    rule: ClassVar[ScaleRule] = ScaleRule(group=32, unit=0.125, top=15, delta=0.0, segment=32, low=0.028, high=0.085)
    signs: ClassVar[Literal["none", "free", "even"]] = "even"
    ggml: ClassVar[CodebookSearch] = CodebookSearch(
        reach=6, fitted=True, even=True, shells=2, again=True, least=1e-15, spread=1.0, required=True
    )

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        entries, negative = self.entries(codes)
        words = torch.cat([(negative & 127).view(len(codes), -1, 4), params["s"][..., None]], dim=-1)
        parts = [entries.to(torch.uint8).view(words.shape[0], -1, 4), fields_to_bytes(words, 7, 4)]
        body = torch.cat(parts, dim=-1).view(len(codes), -1, 64)
        return torch.cat([as_bytes(params["d"]), body], dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        d, body = packed.reshape(len(packed), -1, self.block_bytes).tensor_split((2,), dim=-1)
        entries, words = body.reshape(len(packed), -1, 8).tensor_split((4,), dim=-1)
        fields = bytes_to_fields(words, 7, 5)
        codes = self.codes(entries.flatten(1), eighth_sign(fields[..., :4].flatten(1)))
        return codes, {"d": as_fp16(d), "s": fields[..., 4]}
