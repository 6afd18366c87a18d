"""IQ4_XS: 4-bit codes into a table of uneven levels, 4.25 bits per weight: `w_hat = d * (m - 32) * T[q]`.

T is the table of IQ4_NL, m a 6-bit multiplier per 32 columns, d a scale per super-block of 256.
Block: d, high 2 bits of the 8 multipliers, their low 4 bits, 8 times 16 bytes of nibbles (136 bytes; `block_iq4_xs` of
ggml-common.h, https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtool.formats._base import Params, expand
from qtool.formats._ggml import as_bytes, as_fp16
from qtool.formats._iq4 import IQ4
from qtool.numerics.grids.bits import from_planes, planes
from qtool.numerics.solving.kquant_refit import refit_multiples

LOW_PLACES = torch.tensor([0, 4], dtype=torch.uint8)
HIGH_PLACES = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)


class IQ4_XS(IQ4):  # noqa: N801 - spelled as in ggml
    """See the module. Parameters: d fp16 [N, K / 256], multipliers uint8 [N, K / 32], stored as m."""

    ggml_type: ClassVar[int] = 23
    columns: ClassVar[int] = 256
    block_bytes: ClassVar[int] = 136
    fallback: ClassVar[str | None] = "iq4_nl"
    limit: ClassVar[int] = 32

    def stored(self, d: Tensor, multipliers: Tensor) -> Params:
        """See `IQ4.stored`."""
        return super().stored(d, multipliers) | {"multipliers": (multipliers + 32).to(torch.uint8)}

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        multipliers = params["multipliers"].float() - 32
        scale = expand(params["d"].float(), multipliers.shape[1]) * multipliers
        return scale, torch.zeros_like(scale)

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`: d moves to the least-squares fit for the multipliers, then they are rounded again."""
        groups = scale.view(len(scale), -1, 8)
        multipliers = params["multipliers"].view(groups.shape).float() - 32
        square = multipliers.square().sum(-1)
        old = params["d"].float()
        d = torch.where(square > 0, (groups * multipliers).sum(-1) / square.clamp_min(1), old).half().float()
        near = (groups / torch.where(d == 0, 1.0, d)[..., None]).round().clamp(-32, 31)
        return self.stored(d, near.flatten(1))

    def refit_weighted(self, params: Params, scale: Tensor, offset: Tensor, curvature: Tensor) -> Params:
        """See `Format.refit_weighted`: goes on from the present parameters, row by row."""
        d, multipliers = params["d"].float(), params["multipliers"].float() - 32
        pull = torch.einsum("npq,nq->np", curvature, scale - self.affine(params)[0])
        d, _, multipliers, _ = refit_multiples(curvature, pull, (d, d, multipliers, multipliers), (-32, 31))
        return self.stored(d, multipliers)

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n, blocks = len(codes), codes.shape[1] // 256
        multipliers = params["multipliers"].view(n, blocks, 8)
        parts = [
            as_bytes(params["d"]),
            (multipliers >> 4).view(n, blocks, 2, 4).bitwise_left_shift(HIGH_PLACES).sum(-1, dtype=torch.uint8),
            (multipliers & 15).view(n, blocks, 4, 2).bitwise_left_shift(LOW_PLACES).sum(-1, dtype=torch.uint8),
            planes(codes.reshape(n, blocks, 8, 32), 4, 16).flatten(2),
        ]
        return torch.cat(parts, dim=-1).flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        blocks = packed.reshape(n, -1, self.block_bytes)
        d, high, low, body = blocks.tensor_split((2, 4, 8), dim=-1)
        multipliers = (high[..., None] >> HIGH_PLACES & 3).flatten(2) << 4 | (
            low[..., None] >> LOW_PLACES & 15
        ).flatten(2)
        params = {"d": as_fp16(d), "multipliers": multipliers.flatten(1)}
        return from_planes(body.reshape(n, -1, 8, 16), 4, 16).reshape(n, -1), params
