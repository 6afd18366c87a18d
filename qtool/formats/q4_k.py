"""Q4_K: 4-bit codes, 6-bit scale and minimum per 32 columns, 4.5 bits per weight: `w_hat = d * sc * q - dmin * m`.

Super-block of 256 columns: d, dmin, 12 bytes of scales and minima, 128 of nibbles (144 bytes; `block_q4_K` of
ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtool.formats._base import Params
from qtool.formats._kquant import KQuant, from_sixes, sixes
from qtool.numerics.ggml.groups import Sweep, sweep_of
from qtool.numerics.grids.bits import from_planes, planes


class Q4_K(KQuant):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 12
    block_bytes: ClassVar[int] = 144
    fallback: ClassVar[str | None] = "q5_0"
    free_offset: ClassVar[bool] = True
    group: ClassVar[int] = 32
    bits: ClassVar[int] = 4
    minima: ClassVar[bool] = True
    scale_bits: ClassVar[int] = 6
    ggml_spread: ClassVar[float] = 2
    ggml_sweep: ClassVar[Sweep] = sweep_of(-1, 21)
    ggml_flat: ClassVar[float] = 1

    def pack_block(self, q: Tensor, fields: Params) -> list[Tensor]:
        """See `KQuant.pack_block`."""
        return [fields["d"], fields["dmin"], sixes(fields["sc"], fields["m"]), planes(q, 4)]

    def unpack_block(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """See `KQuant.unpack_block`."""
        d, dmin, scales, q = blocks.tensor_split((2, 4, 16), dim=-1)
        sc, m = from_sixes(scales)
        return from_planes(q, 4), {"d": d, "dmin": dmin, "sc": sc, "m": m}
