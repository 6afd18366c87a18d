"""Looks for codes that are no numbers in bytes that are floating-point numbers of 8 bits, at the speed of memory.

https://arxiv.org/abs/2209.05433, table 1: E4M3 has two of them, one for each sign, all of whose other bits are set.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

SIZE = np.uint64(0x7F7F7F7F7F7F7F7F)
"""Of eight numbers: all bits but their signs."""
ONES = np.uint64(0x0101010101010101)
SIGNS = np.uint64(0x8080808080808080)


@njit(nogil=True, cache=True)
def largest_carry(words):  # type: ignore[no-untyped-def]
    """Of eight bytes at a time, a sign bit for each whose other bits are all set; those of all words together."""
    found = np.uint64(0)
    for i in range(len(words)):
        found |= (words[i] & SIZE) + ONES
    return found & SIGNS


def has_nan(w: Tensor) -> bool:
    """Whether numbers in E4M3, on the CPU, are not all numbers."""
    data = w.contiguous().view(-1).view(torch.uint8).numpy()
    whole = len(data) // 8 * 8
    rest = data[whole:]
    return bool(largest_carry(np.frombuffer(data[:whole], np.uint64))) or bool(((rest & 0x7F) == 0x7F).any())
