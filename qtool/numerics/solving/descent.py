"""Coordinate descent on codes: each in turn moves to the best level given all others.

It minimizes tr(D H D^T), D = W - W_hat, one row at a time, for a grid `w_hat = scale * level + offset` whose
(scale, offset) are fixed per row and group of columns. Most columns stay as they are, so `LANES` of them are looked at
together, and only what wants to move is moved.

Shape letters: N rows, K columns, G groups, L levels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.grids.affine import middles
from qtool.numerics.scales.search import FAST, TINY
from qtool.numerics.solving.split import Split
from qtool.numerics.threads.parallel import over_rows

LANES = 32
"""Columns that are looked at together; divides nothing, the last ones are fewer."""

ORDERED = {"nnan", "nsz", "contract"}
"""Freedoms of the compiler that leave the order of operations as it is."""


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def nearest_move(t, code, levels):  # type: ignore[no-untyped-def]
    """The code of the level nearest to levels[code] + t, for levels that ascend."""
    x, here = levels[code] + t, code
    while here + 1 < len(levels) and x > (levels[here] + levels[here + 1]) * np.float32(0.5):
        here += 1
    while here > 0 and x < (levels[here] + levels[here - 1]) * np.float32(0.5):
        here -= 1
    return here


@njit(nogil=True, cache=True, fastmath=ORDERED, error_model="numpy")
def first_move(wish, code, ends, start, stop):  # type: ignore[no-untyped-def]
    """The first column from `start` on whose wish lies beyond half of the way to a neighbouring level, or `stop`."""
    (up, down, least), some, here = ends, False, wish[start:stop]
    for j in range(len(here)):  # most wishes are less than any of these ways, which no table has to tell
        some |= abs(here[j]) > least
    if some:
        for j in range(start, stop):
            if wish[j] > up[code[j]] or wish[j] < down[code[j]]:
                return j
    return stop


@njit(nogil=True, cache=True, fastmath=ORDERED, error_model="numpy")
def fill_wishes(pull, inverse, wish):  # type: ignore[no-untyped-def]
    """How far, in levels, each column would move."""
    for j in range(len(wish)):
        wish[j] = pull[j] * inverse[j]


@njit(nogil=True, cache=True, error_model="numpy")
def halfway(levels):  # type: ignore[no-untyped-def]
    """How far it is from each level to half of the way to the next one, and to the one before, [L], and the least."""
    up, down = np.full(len(levels), np.float32(np.inf)), np.full(len(levels), np.float32(-np.inf))
    for c in range(len(levels) - 1):
        up[c] = (levels[c + 1] - levels[c]) * np.float32(0.5)
        down[c + 1] = -up[c]
    return up, down, up.min()


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def subtract(row, step, pull):  # type: ignore[no-untyped-def]
    """pull [K] -= step * row [K]."""
    for i in range(len(pull)):
        pull[i] -= step * row[i]


@njit(nogil=True, cache=True, fastmath=ORDERED, error_model="numpy")
def fill_inverse(curvature, scale, inverse, wide):  # type: ignore[no-untyped-def]
    """Fills inverse [K], levels per pull, 0 where none is to move, and wide [K], scales; curvature [K], scale [G]."""
    width = len(curvature) // len(scale)
    for g in range(len(scale)):  # parts of arrays begin at 0, and an index that cannot be negative fills registers
        here, s = slice(g * width, (g + 1) * width), scale[g]
        bend, out, same = curvature[here], inverse[here], wide[here]
        for j in range(len(out)):
            slope = bend[j] * s
            moves = (bend[j] > 0) & (abs(slope) > TINY)
            out[j] = np.float32(1) / (slope if moves else np.float32(np.inf))
        for j in range(len(same)):
            same[j] = s


@njit(nogil=True, cache=True, error_model="numpy")
def move_codes(gram, inverse, wide, levels, ends, codes, pull, moved, wish):  # type: ignore[no-untyped-def]
    """Moves the codes [K] of a row one after the other, and their pull [K]; returns how many moved.

    gram [K, K]; inverse, wide [K]: see `fill_inverse`; ends: see `halfway`; moved [K] is added the changes of w_hat;
    wish [K] is memory.
    """
    k, changes = len(codes), 0
    for a in range(0, k, LANES):
        b, j = min(a + LANES, k), a
        while j < b:
            fill_wishes(pull[j:b], inverse[j:b], wish[j:b])
            j = first_move(wish, codes, ends, j, b)
            if j < b:
                code = nearest_move(wish[j], codes[j], levels)
                step = wide[j] * (levels[code] - levels[codes[j]])
                codes[j] = code
                moved[j] += step
                subtract(gram[j], step, pull)
                changes += 1
                j += 1
    return changes


@njit(nogil=True, cache=True, error_model="numpy")
def descend_rows(gram, curvature, scale, levels, codes, pull, sweeps, start, stop):  # type: ignore[no-untyped-def]
    """Moves the codes of rows start to stop.

    gram [K, K], curvature [K] its diagonal; scale [N, G], for K / G columns each; codes uint8 [N, K] and pull [N, K]
    are kept up to date in place. Every change lowers the objective; a row is done when a sweep changes nothing.
    """
    ends, memory = halfway(levels), np.zeros((4, codes.shape[1]), np.float32)
    inverse, wide, moved, wish = memory[0], memory[1], memory[2], memory[3]
    for n in range(start, stop):
        fill_inverse(curvature, scale[n], inverse, wide)
        for _ in range(sweeps):
            if move_codes(gram, inverse, wide, levels, ends, codes[n], pull[n], moved, wish) == 0:
                break


def descend(
    curvature: Split, scale: Tensor, levels: Tensor, codes: Tensor, pull: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Improves codes by coordinate descent.

    Args:
        curvature: H, float32 [K, K]; on CUDA devices several, see `split`.
        scale: float32 [N, G].
        levels: float32 [L], ascending.
        codes: uint8 [N, K].
        pull: float32 [N, K], (W - W_hat) H.
        sweeps: most passes over a row.

    Returns:
        New codes and their pull.
    """
    if codes.is_cuda:
        from qtool.numerics.solving import cuda_descent

        return cuda_descent.descend(curvature, scale, levels, middles(levels), codes, pull, sweeps)
    better, gradient = (t.cpu().numpy().copy() for t in (codes, pull))
    arrays = [t.contiguous().cpu().numpy() for t in (curvature.matrix, curvature.matrix.diagonal(), scale, levels)]
    over_rows(lambda a, b: descend_rows(*arrays, better, gradient, sweeps, a, b), len(better))
    return torch.from_numpy(better).to(codes.device), torch.from_numpy(gradient).to(pull.device)
