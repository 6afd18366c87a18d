"""Codes of floating-point formats as the bit patterns that layouts store."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._scaled import Scaled


def to_bits(codes: Tensor, fmt: Scaled) -> Tensor:
    """Level indices -> sign and magnitude, uint8 [...]; zero is positive."""
    middle, sign = len(fmt.levels()) // 2, 1 << (fmt.code_bits - 1)
    return torch.where(codes < middle, sign + middle - codes.to(torch.int16), codes.to(torch.int16) - middle).to(
        torch.uint8
    )


def from_bits(bits: Tensor, fmt: Scaled) -> Tensor:
    """The inverse of `to_bits`. Both zeros are zero; what is no number gets an index beyond the last level."""
    middle, sign = len(fmt.levels()) // 2, 1 << (fmt.code_bits - 1)
    magnitude = (bits & (sign - 1)).to(torch.int16)
    codes = torch.where(bits < sign, middle + magnitude, middle - magnitude)
    return torch.where(magnitude > middle, 255, codes).to(torch.uint8)
