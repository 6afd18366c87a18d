"""Q5_K: 5-bit codes, 6-bit scale and minimum per 32 columns, 5.5 bits per weight: `w_hat = d * sc * q - dmin * m`.

Super-block of 256 columns: d, dmin, 12 bytes of scales and minima, 32 with the high bits of the codes, 128 of nibbles
(176 bytes; `block_q5_K` of ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._kquant import KQuant, from_sixes, sixes
from qtool.numerics.ggml.groups import Sweep, sweep_of
from qtool.numerics.grids.bits import from_planes, planes


class Q5_K(KQuant):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 13
    block_bytes: ClassVar[int] = 176
    fallback: ClassVar[str | None] = "q5_1"
    free_offset: ClassVar[bool] = True
    group: ClassVar[int] = 32
    bits: ClassVar[int] = 5
    minima: ClassVar[bool] = True
    scale_bits: ClassVar[int] = 6
    ggml_spread: ClassVar[float] = 2
    ggml_sweep: ClassVar[Sweep] = sweep_of(-0.5, 16)
    ggml_flat: ClassVar[float] = 1

    def pack_block(self, q: Tensor, fields: Params) -> list[Tensor]:
        """See `KQuant.pack_block`."""
        scales = sixes(fields["sc"], fields["m"])
        return [fields["d"], fields["dmin"], scales, planes(q, 1, shift=4), planes(q, 4)]

    def unpack_block(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """See `KQuant.unpack_block`."""
        d, dmin, scales, high, low = blocks.tensor_split((2, 4, 16, 48), dim=-1)
        sc, m = from_sixes(scales)
        return from_planes(low, 4) | from_planes(high, 1) << 4, {"d": d, "dmin": dmin, "sc": sc, "m": m}
