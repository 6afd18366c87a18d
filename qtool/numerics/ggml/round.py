"""The classic encoders of ggml, which do not search, in one pass over the weights: its operations, in its order.

Shape letters: N rows, K columns, G blocks of K / G columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, error_model="numpy")
def end_rows(w, low, high, extreme, start, stop):  # type: ignore[no-untyped-def]
    """Fills low, high and extreme, the first of the largest absolute value, all [N, G], for rows start to stop."""
    width = w.shape[1] // low.shape[1]
    for n in range(start, stop):
        for g in range(low.shape[1]):
            x = w[n, g * width : (g + 1) * width]
            least = most = x[0]
            for j in range(1, width):
                least, most = min(least, x[j]), max(most, x[j])
            low[n, g], high[n, g], extreme[n, g] = least, most, most
            if -least > most:
                extreme[n, g] = least
            elif -least == most:
                for j in range(width):
                    if abs(x[j]) == most:
                        extreme[n, g] = x[j]
                        break


@njit(nogil=True, cache=True, error_model="numpy")
def round_rows(w, d, m, lowest, last, away, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes [N, K] for rows start to stop; ties go away from zero, or up and into [0, last]."""
    width = w.shape[1] // d.shape[1]
    for n in range(start, stop):
        for g in range(d.shape[1]):
            x, out, least = w[n, g * width : (g + 1) * width], codes[n, g * width : (g + 1) * width], m[n, g]
            inverse = np.float32(1) / d[n, g] if d[n, g] != 0 else np.float32(0)
            if away:
                for j in range(width):
                    y = (x[j] - least) * inverse
                    whole = np.trunc(y)
                    if abs(y - whole) >= np.float32(0.5):
                        whole += np.copysign(np.float32(1), y)
                    out[j] = np.uint8(np.int32(whole - lowest))
            else:
                for j in range(width):
                    y = np.floor((x[j] - least) * inverse + (np.float32(0.5) - lowest))
                    out[j] = np.uint8(np.int32(min(max(y, np.float32(0)), last)))


def ends(w: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest, largest, and first largest absolute number of each block of `width` columns.

    Args:
        w: float32 [N, K].
        width: K / G.

    Returns:
        float32 [N, G] each; the last one keeps its sign.
    """
    found = [torch.empty(len(w), w.shape[1] // width) for _ in range(3)]
    arrays = [t.contiguous().cpu().numpy() for t in (w, *found)]
    over_rows(lambda a, b: end_rows(*arrays, a, b), len(w))
    low, high, extreme = (t.to(w.device) for t in found)
    return low, high, extreme


def round_blocks(w: Tensor, d: Tensor, m: Tensor, lowest: int, bits: int) -> Tensor:
    """Codes for w ~ d * (code + lowest) + m: times the reciprocal, then ties up, or with 8 bits away from zero.

    Args:
        w: float32 [N, K].
        d: float32 [N, G], not yet rounded to fp16.
        m: float32 [N, G].
        lowest: level of code 0.
        bits: of a code.

    Returns:
        uint8 [N, K].
    """
    codes = torch.empty(w.shape, dtype=torch.uint8)
    arrays = [t.contiguous().cpu().numpy() for t in (w, d, m)]
    limits = np.float32(lowest), np.float32((1 << bits) - 1)
    over_rows(lambda a, b: round_rows(*arrays, *limits, bits == 8, codes.numpy(), a, b), len(w))
    return codes.to(w.device)
