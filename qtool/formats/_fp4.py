"""E2M1 codes as bits: 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, and 8 to 15 their negatives.

Levels ascend, so code 7 here is zero; negative zero, which nobody writes here, is read as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.grids.bits import stack_runs


def pack_halves(codes: Tensor, out: Tensor) -> None:
    """Fills out uint8 [N, C / 2] with column j in the low and column j + C / 2 in the high nibble of byte j.

    codes: level indices [N, C].
    """
    stack_runs(codes, (1, 16), codes.shape[1] // 2, signed=True, out=out)


def from_bit_patterns(bits: Tensor) -> Tensor:
    """Sign and magnitude -> level index."""
    return torch.where(bits < 8, bits + 7, 15 - bits)
