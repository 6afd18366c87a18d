"""Q6_K: 6-bit codes, signed 8-bit scale per 16 columns, 6.5625 bits per weight: `w_hat = d * sc * (q - 32)`.

Super-block of 256 columns: 128 bytes with the low 4 bits of the codes, 64 with their high 2 bits, 16 scales, d (210
bytes; `block_q6_K` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._kquant import KQuant
from qtool.numerics.ggml.groups import Sweep, sweep_of
from qtool.numerics.grids.bits import from_planes, planes


class Q6_K(KQuant):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 14
    block_bytes: ClassVar[int] = 210
    fallback: ClassVar[str | None] = "q8_0"
    bits: ClassVar[int] = 6
    scale_bits: ClassVar[int] = 8
    ggml_spread: ClassVar[float] = -1
    ggml_sweep: ClassVar[Sweep] = sweep_of(-0.9, 19)

    def pack_block(self, q: Tensor, fields: Params) -> list[Tensor]:
        """See `KQuant.pack_block`."""
        return [planes(q, 4, 64), planes(q, 2, shift=4), fields["sc"], fields["d"]]

    def unpack_block(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """See `KQuant.unpack_block`."""
        low, high, sc, d = blocks.tensor_split((128, 192, 208), dim=-1)
        return from_planes(low, 4, 64) | from_planes(high, 2) << 4, {"d": d, "sc": sc}
