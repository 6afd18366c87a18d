"""Q2_K: 2-bit codes, 4-bit scale and minimum per 16 columns, 2.625 bits per weight: `w_hat = d * sc * q - dmin * m`.

Super-block of 256 columns: 16 bytes with sc in the low and m in the high nibble, 64 bytes of codes, d, dmin (84 bytes;
`block_q2_K` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._kquant import KQuant
from qtool.numerics.ggml.groups import Sweep, sweep_of
from qtool.numerics.grids.bits import from_planes, planes


class Q2_K(KQuant):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 10
    block_bytes: ClassVar[int] = 84
    fallback: ClassVar[str | None] = "q4_0"
    free_offset: ClassVar[bool] = True
    bits: ClassVar[int] = 2
    minima: ClassVar[bool] = True
    scale_bits: ClassVar[int] = 4
    ggml_spread: ClassVar[float] = 1
    ggml_sweep: ClassVar[Sweep] = sweep_of(-0.5, 16, absolute=True)

    def pack_block(self, q: Tensor, fields: Params) -> list[Tensor]:
        """See `KQuant.pack_block`."""
        return [fields["sc"] | fields["m"] << 4, planes(q, 2), fields["d"], fields["dmin"]]

    def unpack_block(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """See `KQuant.unpack_block`."""
        scales, q, d, dmin = blocks.tensor_split((16, 80, 82), dim=-1)
        return from_planes(q, 2), {"d": d, "dmin": dmin, "sc": scales & 15, "m": scales >> 4}
