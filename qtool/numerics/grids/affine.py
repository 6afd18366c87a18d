"""Rounding to `scale * level + offset` and back, in one pass over the weights each, compiled.

The arithmetic is that of separate float32 operations, so results are those of torch, bit by bit.

Shape letters: N rows, C columns, G groups of C / G columns, L levels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import pad

from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, error_model="numpy")
def round_rows(w, scale, offset, lowest, highest, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes [N, C], uint8, for rows start to stop."""
    width = w.shape[1] // scale.shape[1]
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            x, out = w[n, g * width : (g + 1) * width], codes[n, g * width : (g + 1) * width]
            s, o = scale[n, g], offset[n, g]
            if s == 0:
                s, o = np.float32(np.inf), np.float32(0)
            for j in range(width):
                out[j] = np.uint8(np.int32(min(max(np.rint((x[j] - o) / s), lowest), highest) - lowest))


@njit(nogil=True, cache=True, error_model="numpy")
def decode_rows(codes, levels, scale, offset, w, start, stop):  # type: ignore[no-untyped-def]
    """Fills w [N, C] for rows start to stop."""
    width = w.shape[1] // scale.shape[1]
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            code, out = codes[n, g * width : (g + 1) * width], w[n, g * width : (g + 1) * width]
            s, o = scale[n, g], offset[n, g]
            for j in range(width):
                out[j] = levels[code[j]] * s + o


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def range_rows(w, low, high, start, stop):  # type: ignore[no-untyped-def]
    """Fills low and high [N, G], finite, for rows start to stop."""
    width = w.shape[1] // low.shape[1]
    for n in range(start, stop):
        for g in range(low.shape[1]):
            x = w[n, g * width : (g + 1) * width]
            least, most = x[0], x[0]
            for j in range(width):
                least, most = min(least, x[j]), max(most, x[j])
            low[n, g], high[n, g] = least, most


def ranges(w: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Least and largest number of each group of finite ones: float32 [N, C] -> [N, G] each."""
    if w.device.type != "cpu":
        low, high = w.view(len(w), groups, -1).aminmax(dim=2)
        return low, high
    found = np.empty((2, len(w), groups), np.float32)
    values = w.float().contiguous().numpy()
    over_rows(lambda a, b: range_rows(values, *found, a, b), len(w))
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def middles(levels: Tensor) -> Tensor:
    """Halfway between neighbouring levels [L], filled up with infinity to a power of two less one, for bisection."""
    between = (levels[1:] + levels[:-1]) * 0.5
    return pad(between, (0, (1 << len(between).bit_length()) - 1 - len(between)), value=torch.inf)


def round_to_levels(w: Tensor, scale: Tensor, offset: Tensor, lowest: float, highest: float) -> Tensor:
    """Nearest codes, for levels that are consecutive integers; ties go to the even level.

    Args:
        w: float32 [N, C].
        scale: float32 [N, G]; where it is 0, the level nearest to 0 is taken.
        offset: float32 [N, G].
        lowest: first level.
        highest: last level.

    Returns:
        uint8 [N, C].
    """
    assert len(scale) == len(w) and w.shape[1] % scale.shape[1] == 0
    if w.is_cuda:
        from qtool.numerics.grids import cuda_affine

        return cuda_affine.round_to_levels(w, scale, offset, lowest, highest)
    codes = np.empty(w.shape, np.uint8)
    arrays = [t.contiguous().numpy() for t in (w, scale, offset)]
    ends = np.float32(lowest), np.float32(highest)
    over_rows(lambda a, b: round_rows(*arrays, *ends, codes, a, b), len(codes))
    return torch.from_numpy(codes)


def decode_levels(codes: Tensor, levels: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`levels[codes] * scale + offset`: uint8 [N, C], float32 [L], [N, G] and [N, G] -> float32 [N, C].

    Codes that stand for no level decode to NaN.
    """
    assert len(scale) == len(codes) and codes.shape[1] % scale.shape[1] == 0
    table = pad(levels, (0, 256 - len(levels)), value=torch.nan)  # whatever codes are, nothing outside of it is read
    if codes.is_cuda:
        from qtool.numerics.grids import cuda_affine

        return cuda_affine.decode_levels(codes, table, scale, offset)
    w = np.empty(codes.shape, np.float32)
    arrays = [t.contiguous().numpy() for t in (codes, table, scale, offset)]
    over_rows(lambda a, b: decode_rows(*arrays, w, a, b), len(w))
    return torch.from_numpy(w)
