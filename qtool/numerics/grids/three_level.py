"""Scales of HiF4: a float for 64 columns, a bit of exponent for 8 and another for 4; the choice of least error.

Given the float b, the bits of each 8 columns are independent of all others, so that they are found by trying them.

Shape letters: N rows, C columns, S blocks of 64.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, fastmath=FAST)
def four_error(x, weight, step):  # type: ignore[no-untyped-def]
    """Weighted squared error of four columns, rounded to multiples of a step up to 7."""
    total, inverse = np.float32(0.0), np.float32(1.0) / step
    for j in range(4):
        d = min(max(np.rint(x[j] * inverse), np.float32(-7.0)), np.float32(7.0)) * step - x[j]
        total += weight[j] * d * d
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
def block_bits(x, weight, b):  # type: ignore[no-untyped-def]
    """(error, bits of 8 columns, bits of 4 columns) of the best bits for b."""
    total, eights, fours = np.float32(0.0), np.uint32(0), np.uint32(0)
    step = b * np.float32(0.25)
    for i in range(8):
        low, high, low_bits, high_bits = np.float32(0.0), np.float32(0.0), np.uint32(0), np.uint32(0)
        for half in range(2):
            at = 8 * i + 4 * half
            part, w = x[at : at + 4], weight[at : at + 4]
            one, two = four_error(part, w, step), four_error(part, w, step * np.float32(2.0))
            four = four_error(part, w, step * np.float32(4.0))
            low += min(one, two)
            high += min(two, four)
            low_bits |= np.uint32(np.uint32(two < one) << np.uint32(half))
            high_bits |= np.uint32(np.uint32(four < two) << np.uint32(half))
        total += min(low, high)
        eights |= np.uint32(np.uint32(high < low) << np.uint32(i))
        fours |= np.uint32((high_bits if high < low else low_bits) << np.uint32(2 * i))
    return total, eights, fours


@njit(nogil=True, cache=True)
def block_rows(x, weight, base, values, tried, codes, eights, fours, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes, eights uint8 [N, S] and fours uint8 [N, 2 S] for rows start to stop of x [N, C]."""
    for n in range(start, stop):
        for s in range(base.shape[1]):
            part, w, least = x[n, 64 * s : 64 * s + 64], weight[64 * s : 64 * s + 64], np.float32(np.inf)
            codes[n, s] = base[n, s]
            for move in tried:
                code = min(max(np.int32(base[n, s]) + move, 0), len(values) - 1)
                error, eight, four = block_bits(part, w, values[code])
                if error < least:
                    least, codes[n, s], eights[n, s] = error, code, eight
                    fours[n, 2 * s], fours[n, 2 * s + 1] = four & np.uint32(255), four >> np.uint32(8)


def best_blocks(
    x: Tensor, weight: Tensor, base: Tensor, values: Tensor, tried: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes of b and bits of 8 columns, uint8 [N, S] each; bits of 4 columns, uint8 [N, 2 S]), lowest bits first.

    Args:
        x: float32 [N, C].
        weight: float32 [C], of a squared error.
        base: uint8 [N, S], codes to look around.
        values: float32, what codes stand for; above zero.
        tried: moves from there.
    """
    arrays = [t.contiguous().cpu().numpy() for t in (x, weight, base, values)]
    codes, eights = (np.zeros(base.shape, np.uint8) for _ in range(2))
    fours = np.zeros((len(base), 2 * base.shape[1]), np.uint8)
    over_rows(lambda a, b: block_rows(*arrays, np.array(tried), codes, eights, fours, a, b), len(x))
    found = (torch.from_numpy(part).to(x.device) for part in (codes, eights, fours))
    return tuple(found)  # type: ignore[return-value]
