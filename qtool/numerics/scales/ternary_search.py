"""Scales for levels -1, 0, 1: minimize sum_j importance_j (x_j - d * l_j)^2 over d and l.

For a given d, weights beyond d / 2 get a level; for given levels, d is their weighted mean size. What gets a level is
always the largest weights of the block, so trying every count of them, in order of size, is exact. The fast variant
goes back and forth between the two conditions instead, from the mean size and from the largest weight on.

Shape letters: N rows, C columns, S blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.threads.parallel import over_rows

TURNS = 4
AHEAD = np.float32(1.6)
"""Times the mean size the way up begins; it ends at 1.53 for a normal distribution, and at 2 for that of Laplace."""
SIZE = np.int32(0x7FFFFFFF)
"""Bits of a float32: all but its sign."""


@njit(nogil=True, cache=True, fastmath=FAST)
def counted(v, weight, d):  # type: ignore[no-untyped-def]
    """Sums of weight x size, and of weight, over what gets a level at a scale d."""
    top, bottom, least = np.float32(0.0), np.float32(0.0), d * np.float32(0.5)
    for j in range(len(v)):
        size = abs(v[j])
        weighed = weight[j] if size >= least else np.float32(0.0)
        top += weighed * size
        bottom += weighed
    return top, bottom


@njit(nogil=True, cache=True, fastmath=FAST)
def from_both_ends(v, weight, total):  # type: ignore[no-untyped-def]
    """The better d of those that are reached from all weights, and from the largest alone, which is ggml's choice.

    total: of the weight.
    """
    largest, mean, bits = np.int32(0), np.float32(0.0), v.view(np.int32)
    for j in range(len(v)):
        largest = max(largest, bits[j] & SIZE)
        mean += weight[j] * abs(v[j])
    top, bottom = counted(v, weight, np.int32(largest).view(np.float32))
    high = top / bottom
    gain, low = top * high, AHEAD * mean / total
    for _ in range(TURNS):
        top, bottom = counted(v, weight, low)
        low = top / bottom if bottom > 0 else np.float32(0.0)
    return low if top * low >= gain else high


@njit(nogil=True, cache=True, fastmath=FAST)
def exact(v, weight):  # type: ignore[no-untyped-def]
    """The best d of a block."""
    top, bottom, best, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in np.argsort(-np.abs(v)):
        top += weight[j] * abs(v[j])
        bottom += weight[j]
        if bottom > 0 and top * top > best * bottom:
            best, d = top * top / bottom, top / bottom
    return d


@njit(nogil=True, cache=True)
def ternary_rows(x, weight, thorough, d, start, stop):  # type: ignore[no-untyped-def]
    """Fills d [N, S] for rows start to stop. x [N, C]; weight [C]."""
    width = x.shape[1] // d.shape[1]
    total = np.zeros(d.shape[1], np.float32)
    for j in range(x.shape[1]):
        total[j // width] += weight[j]
    for n in range(start, stop):
        for s in range(d.shape[1]):
            v, w = x[n, s * width : (s + 1) * width], weight[s * width : (s + 1) * width]
            d[n, s] = exact(v, w) if thorough else from_both_ends(v, w, total[s])


def ternary_scales(x: Tensor, weight: Tensor, width: int, thorough: bool) -> Tensor:
    """d of every block, float32 [N, S], on the device of x.

    Args:
        x: float32 [N, C].
        weight: float32 [C] > 0, of a column's squared error.
        width: columns of a block.
        thorough: exact.
    """
    values, weights = x.float().contiguous().cpu().numpy(), weight.cpu().numpy()
    d = np.zeros((x.shape[0], x.shape[1] // width), np.float32)
    over_rows(lambda a, b: ternary_rows(values, weights, thorough, d, a, b), len(values))
    return torch.from_numpy(d).to(x.device)
