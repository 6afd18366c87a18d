"""TQ2_0: levels -1, 0, 1 and one fp16 scale per 256 columns, four codes to a byte, 2.0625 bits per weight.

Block: 2 times 32 bytes, each with the codes of four columns that lie 32 apart, the first in the lowest bits; d (66
bytes; `block_tq2_0` of ggml-common.h, https://github.com/ggml-org/llama.cpp). The fourth value of two bits is not used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtool.errors import CheckpointError
from qtool.formats._base import Params
from qtool.formats._ggml import as_fp16
from qtool.formats._ternary import Ternary
from qtool.numerics.grids.bits import from_planes, planes


class TQ2_0(Ternary):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 35
    block_bytes: ClassVar[int] = 66

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        q = codes.reshape(-1, 256)
        packed = torch.empty(len(q), self.block_bytes, dtype=torch.uint8)
        planes(q, 2, out=packed[:, :64])
        packed.view(torch.float16)[:, -1] = params["d"].reshape(-1)
        return packed.view(len(codes), -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`. Raises CheckpointError: codes that are not ternary."""
        n = len(packed)
        blocks = packed.reshape(n, -1, self.block_bytes)
        codes = from_planes(blocks[..., :64], 2).reshape(n, -1)
        if bool((codes == 3).any()):
            raise CheckpointError("a TQ2_0 tensor holds codes that are not ternary", wanted="0, 1 or 2", found=3)
        return codes, {"d": as_fp16(blocks[..., 64:])}
