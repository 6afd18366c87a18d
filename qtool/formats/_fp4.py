"""E2M1 codes as bits: 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, and 8 to 15 their negatives.

Levels ascend, so code 7 here is zero; negative zero, which nobody writes here, is read as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bit_patterns(codes: Tensor) -> Tensor:
    """uint8 level indices, 0 to 14 -> uint8 sign and magnitude."""
    return torch.where(codes < 7, 15 - codes, codes - 7)


def from_bit_patterns(bits: Tensor) -> Tensor:
    """The inverse of `bit_patterns`."""
    return torch.where(bits < 8, bits + 7, 15 - bits)


def pack_halves(q: Tensor) -> Tensor:
    """Column j in the low and column j + C/2 in the high nibble of byte j: uint8 [..., C] -> [..., C/2]."""
    half = q.shape[-1] // 2
    return q[..., :half] | (q[..., half:] << 4)


def nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_halves`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)
