"""Codes of floating-point formats as the bit patterns that layouts store."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._scaled import Scaled
from qtool.numerics.metrics import all_finite
from qtool.numerics.nans import has_nan


def to_bits(codes: Tensor, fmt: Scaled) -> Tensor:
    """Level indices -> sign and magnitude, uint8 [...]; zero is positive."""
    middle = len(fmt.levels()) // 2
    negative = (codes < middle).to(torch.uint8)
    return _negated(codes.to(torch.uint8) - middle, negative) | negative << (fmt.code_bits - 1)


def from_bits(bits: Tensor, fmt: Scaled) -> Tensor:
    """The inverse of `to_bits`. Both zeros are zero; what is no number gets an index beyond the last level."""
    middle, shift = len(fmt.levels()) // 2, fmt.code_bits - 1
    magnitude = bits.to(torch.uint8) & ((1 << shift) - 1)
    codes = _negated(magnitude, bits.to(torch.uint8) >> shift) + middle
    return codes.masked_fill_(magnitude > middle, 255)


def finite_e4m3(data: Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of a tensor of FP8 weights, or of their scales, make finite weights, uint8 [n]."""
    if dtype == torch.float8_e4m3fn:
        return not has_nan(data)
    return all_finite(data.view(dtype).float() * torch.finfo(torch.float8_e4m3fn).max)


def _negated(values: Tensor, negative: Tensor) -> Tensor:
    """Values, times -1 where `negative` is 1 and not 0, modulo 256: uint8 throughout, which is quick."""
    mask = negative * 255
    return (values ^ mask) - mask
