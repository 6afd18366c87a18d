"""MXFP4: 32 columns share a power of two, elements are E2M1; 4.25 bits per weight. In GGUF it is block type 39.

    w_hat = 2^(e - 127) * v        v of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

`search: ggml` gives the bytes of `ggml_quantize_chunk`: the exponents of `floor`, and ties rounded to zero.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
https://github.com/ggml-org/llama.cpp, block_mxfp4 in ggml/src/ggml-common.h
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qtool.formats._base import Params, expand
from qtool.formats._fp4 import from_bit_patterns, pack_halves
from qtool.formats._ggml import BlockFormat
from qtool.formats._shared_exponent import MX
from qtool.numerics.grids.bits import from_planes


class MXFP4(MX, BlockFormat):
    """4-bit microscaling floats."""

    examples: ClassVar[tuple[str, ...]] = ("mxfp4-floor", "mxfp4-up", "mxfp4-ggml")
    usual: ClassVar[str] = "e2m1"
    ggml_type: ClassVar[int] = 39
    columns: ClassVar[int] = 32
    block_bytes: ClassVar[int] = 17
    fallback: ClassVar[str | None] = None
    cheap: ClassVar[bool] = True

    element: Literal["e2m1"] = "e2m1"
    search: Literal["ggml", "floor", "up", "even", "fast", "default", "thorough"] = "default"  # type: ignore[assignment]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        found = super().fit(w, importance)
        if self._alone or self.search not in ("default", "thorough"):
            return found
        return self.no_worse(found, self._store(self.in_chunks(self._ggml_choice, w)), w, importance)

    def _wanted(self, w: Tensor) -> Tensor:
        return self._ggml_choice(w) if self.search == "ggml" else super()._wanted(w)

    def _ggml_choice(self, w: Tensor) -> Tensor:
        largest = self.largest(w, w.shape[1] // 32)
        power = largest.double().log2().float().floor()  # a logarithm in float32, as in C, may round up to a whole one
        return torch.where(largest > 0, torch.ldexp(torch.full_like(power, 0.25), power.int()), 0.0)

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`. ggml takes the first of two levels that are equally near, which is the smaller one."""
        if self.search != "ggml":
            return super().snap(w, params, importance)
        magnitudes = self.levels()[7:].to(w.device)
        x = w / expand(self.scale(params), w.shape[1])
        code = torch.bucketize(x.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
        return torch.where(x < 0, 7 - code, 7 + code).to(torch.uint8)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`: the exponent, then byte j with columns j and j + 16."""
        q = codes.reshape(-1, 32)
        packed = torch.empty(len(q), self.block_bytes, dtype=torch.uint8)
        packed[:, 0] = params["exponent"].reshape(-1)
        pack_halves(q, packed[:, 1:])
        return packed.view(len(codes), -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        blocks = packed.reshape(len(packed), -1, self.block_bytes)
        q = from_bit_patterns(from_planes(blocks[..., 1:], 4, 16))
        return q.reshape(len(packed), -1), {"exponent": blocks[..., 0].contiguous()}
