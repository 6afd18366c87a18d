"""Integer steps and zero points for integers inside of integers, by looking at all that are sensible.

A group of integers x (real numbers here) of 8 bits is held as s (q - z), with q and z of 4 bits and a whole s, so that
8-bit arithmetic gets them back without overflow: for every q, -128 <= s (q - z) <= 127. So s is at most 16.

Shape letters: N rows, C columns, G groups of C / G columns each.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST, prepared
from qtool.numerics.threads.parallel import over_rows

TOP = 15
"""The largest code."""
LARGEST_STEP = 16


@njit(nogil=True, cache=True, fastmath=FAST)
def error(v, weight, step, zero):  # type: ignore[no-untyped-def]
    """Weighted squared error of a group."""
    total, inverse = np.float32(0.0), np.float32(1.0) / step
    for j in range(len(v)):
        q = min(max(np.rint(v[j] * inverse) + zero, np.float32(0.0)), np.float32(15.0))
        d = v[j] - step * (q - zero)
        total += weight[j] * d * d
    return total


@njit(nogil=True, cache=True)
def progressive_rows(x, importance, tightest, steps, zeros, start, stop):  # type: ignore[no-untyped-def]
    """Fills steps and zeros, uint8 [N, G], for rows start to stop. x [N, C]; importance [C].

    Steps are tried from `tightest` times the one that covers the group, up to the one after it.
    """
    width = x.shape[1] // steps.shape[1]
    for n in range(start, stop):
        for g in range(steps.shape[1]):
            v, weight = x[n, g * width : (g + 1) * width], importance[g * width : (g + 1) * width]
            low, high = min(v.min(), np.float32(0.0)), max(v.max(), np.float32(0.0))
            covering = (high - low) / 15
            least = np.float32(np.inf)
            first = min(max(1, int(covering * tightest)), LARGEST_STEP)
            for step in range(first, min(int(np.ceil(covering)) + 1, LARGEST_STEP) + 1):
                middle = np.rint(7.5 - (low + high) / 2 / step)
                for shift in (0, 1, -1):
                    zero = int(min(max(middle + shift, 0, 15 - 127 // step), 15, 128 // step))
                    found = error(v, weight, np.float32(step), np.float32(zero))
                    if found < least:
                        least, steps[n, g], zeros[n, g] = found, step, zero


def progressive(x: Tensor, importance: Tensor | None, groups: int, tightest: float) -> tuple[Tensor, Tensor]:
    """The best steps and zero points of groups.

    Args:
        x: float32 [N, C], about -119 to 119.
        importance: float32 [C] or None.
        groups: G.
        tightest: the smallest step to try, relative to the one that covers a group.

    Returns:
        (s, z), uint8 [N, G] each.
    """
    values, weight, _ = prepared(x, importance, x.shape[1] // groups)
    steps, zeros = (np.zeros((len(values), groups), np.uint8) for _ in range(2))
    over_rows(lambda a, b: progressive_rows(values, weight, tightest, steps, zeros, a, b), len(values))
    return torch.from_numpy(steps).to(x.device), torch.from_numpy(zeros).to(x.device)


def largest_step(zero: Tensor) -> Tensor:
    """The largest step that overflows with no code: zero points uint8 -> int32."""
    z = zero.int()
    above, below = 127 // (TOP - z).clamp_min(1), 128 // z.clamp_min(1)
    return torch.minimum(above, below)
