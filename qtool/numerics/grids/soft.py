"""Rounding that gradients go through, in one pass over the weights each way, compiled; tensors on the CPU.

Arithmetic of values is that of separate float32 operations; see `qtool.methods._soft` for what is computed.

Shape letters: N rows, C columns, G groups of C / G columns, L levels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.threads.parallel import over_rows

SUMS = {"reassoc", "nsz"}
"""Freedom of the compiler where a group's terms are added."""


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def step_of(x, levels):  # type: ignore[no-untyped-def]
    """The step among uneven levels that x lies in: as many as there are inner levels up to x."""
    low, high = 0, len(levels) - 2
    while low < high:
        middle = (low + high) // 2
        if levels[middle + 1] <= x:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def place_of(x, levels):  # type: ignore[no-untyped-def]
    """(place of x among uneven levels; width of its step)."""
    below = step_of(x, levels)
    width = levels[below + 1] - levels[below]
    return np.float32(below) + ((x - levels[below]) / width if width > 0 else np.float32(0)), width


@njit(nogil=True, cache=True, error_model="numpy")
def code_rows(w, v, scale, offset, levels, even, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes [N, C], uint8, for rows start to stop: places plus v, rounded."""
    size, top = w.shape[1] // scale.shape[1], np.float32(len(levels) - 1)
    lowest, step = levels[0], levels[1] - levels[0]
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            part = slice(g * size, (g + 1) * size)
            x, move, out = w[n, part], v[n, part], codes[n, part]
            s, o = scale[n, g], offset[n, g]
            if s == 0:
                s, o = np.float32(np.inf), np.float32(0)
            if even:
                for j in range(size):
                    y = ((x[j] - o) / s - lowest) / step + move[j]
                    out[j] = np.uint8(np.int32(min(max(np.rint(y), np.float32(0)), top)))
            else:
                for j in range(size):
                    y = place_of((x[j] - o) / s, levels)[0] + move[j]
                    out[j] = np.uint8(np.int32(min(max(np.rint(y), np.float32(0)), top)))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=SUMS)
def even_slopes(x, move, slope, affine, lowest, step, top, by_v):  # type: ignore[no-untyped-def]
    """Fills by_v [C] of a group where all steps are as wide; (gradient by its scale, by its offset)."""
    s, o = affine
    divisor, origin = (s, o) if s != 0 else (np.float32(np.inf), np.float32(0))
    scales, offsets = np.float32(0), np.float32(0)
    for j in range(len(x)):
        at = (x[j] - origin) / divisor
        y = (at - lowest) / step + move[j]
        free = np.float32(1) if (y > -0.5) and (y < top + np.float32(0.5)) else np.float32(0)
        level = lowest + step * min(max(np.rint(y), np.float32(0)), top)
        by_v[j] = slope[j] * (free * step * s)
        scales += slope[j] * (level - free * at)
        offsets += slope[j] * (np.float32(1) - free)
    return scales, offsets


@njit(nogil=True, cache=True, error_model="numpy", fastmath=SUMS)
def uneven_slopes(x, move, slope, affine, levels, by_v):  # type: ignore[no-untyped-def]
    """The same where steps differ."""
    s, o = affine
    divisor, origin = (s, o) if s != 0 else (np.float32(np.inf), np.float32(0))
    scales, offsets = np.float32(0), np.float32(0)
    top = len(levels) - 1
    for j in range(len(x)):
        at = (x[j] - origin) / divisor
        y, width = place_of(at, levels)
        y += move[j]
        here, share = np.float32(0), np.float32(0)
        if (y > -0.5) and (y < top + np.float32(0.5)):
            below = np.int32(min(max(np.floor(y), 0), top - 1))
            here = levels[below + 1] - levels[below]
            share = here / width if width > 0 else np.float32(0)
        by_v[j] = slope[j] * (here * s)
        scales += slope[j] * (levels[np.int32(min(max(np.rint(y), 0), top))] - share * at)
        offsets += slope[j] * (np.float32(1) - share)
    return scales, offsets


@njit(nogil=True, cache=True, error_model="numpy")
def slope_rows(gradient, w, v, affine, levels, even, by_v, by_affine, start, stop):  # type: ignore[no-untyped-def]
    """Fills gradients by v [N, C], scale and offset [N, G] for rows start to stop."""
    (scale, offset), (by_scale, by_offset) = affine, by_affine
    size, top = w.shape[1] // scale.shape[1], np.float32(len(levels) - 1)
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            part, own = slice(g * size, (g + 1) * size), (scale[n, g], offset[n, g])
            x, move, slope, out = w[n, part], v[n, part], gradient[n, part], by_v[n, part]
            if even:
                found = even_slopes(x, move, slope, own, levels[0], levels[1] - levels[0], top, out)
            else:
                found = uneven_slopes(x, move, slope, own, levels, out)
            by_scale[n, g], by_offset[n, g] = found


def codes_of(w: Tensor, v: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, even: bool) -> Tensor:
    """Places of weights among levels plus v, rounded: float32 [N, C] twice, [N, G] twice, [L] -> uint8 [N, C]."""
    codes = np.empty(w.shape, np.uint8)
    arrays = [t.contiguous().numpy() for t in (w, v, scale, offset, levels)]
    over_rows(lambda a, b: code_rows(*arrays, even, codes, a, b), len(codes))
    return torch.from_numpy(codes)


def slopes_of(
    gradient: Tensor, w: Tensor, v: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, even: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by v [N, C], scale and offset [N, G], given that by values; the rest as in `codes_of`."""
    by_v, by_scale, by_offset = torch.empty_like(w), torch.empty_like(scale), torch.empty_like(scale)
    given = [t.contiguous().numpy() for t in (gradient, w, v)]
    own = scale.contiguous().numpy(), offset.contiguous().numpy()
    found = by_v.numpy(), (by_scale.numpy(), by_offset.numpy())
    over_rows(lambda a, b: slope_rows(*given, own, levels.numpy(), even, *found, a, b), len(w))
    return by_v, by_scale, by_offset
