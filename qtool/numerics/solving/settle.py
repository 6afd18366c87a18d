"""Coordinate descent on scales that are stored as codes and on the codes that they multiply, block by block of columns.

It minimizes tr(D H D^T), D = W - W_hat, row by row, for w_hat = s_g * level with s_g out of a table. Given all others,
the objective is a parabola in a scale, so that the best one in the table is that nearest to its vertex: what is stored
is chosen at once, and no real number has to be rounded that others have relied upon. In each block first the scales
move, group by group, then the codes; columns elsewhere learn of both by one product of matrices.

Shape letters: N rows, K columns, B columns of a block, G groups, W columns of a group, L levels, S scales of the table.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.solving.descent import ORDERED, fill_inverse, halfway, move_codes, nearest_move, subtract
from qtool.numerics.threads.parallel import over_rows

BLOCK = 128
"""B, unless fewer are left; whole groups."""


def settles(width: int) -> bool:
    """Whether `settle` takes groups of so many columns."""
    return BLOCK % width == 0


@njit(nogil=True, cache=True, fastmath=ORDERED, error_model="numpy")
def add_rows(rows, factors, total):  # type: ignore[no-untyped-def]
    """total [B] += factors [W] times rows [W, B], in order, four at a time: the total is loaded and stored once."""
    whole = len(factors) // 4 * 4
    for i in range(0, whole, 4):
        p, q, r, s = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        a, b, c, d = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for j in range(len(total)):
            total[j] = (((total[j] + a * p[j]) + b * q[j]) + c * r[j]) + d * s[j]
    for i in range(whole, len(factors)):
        p, a = rows[i], factors[i]
        for j in range(len(total)):
            total[j] += a * p[j]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def products(gram, level, a, seen):  # type: ignore[no-untyped-def]
    """Fills seen [B] with level [W] times gram [W from `a` on, B]; returns what the group's own part of it gives."""
    seen[:] = np.float32(0)
    add_rows(gram[a : a + len(level)], level, seen)
    bend = np.float32(0)
    for i in range(len(level)):
        bend += level[i] * seen[a + i]
    return bend


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def dot(x, y):  # type: ignore[no-untyped-def]
    """Sum of x * y."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def move_scales(gram, levels, values, found, codes, pull, moved, level, seen):  # type: ignore[no-untyped-def]
    """Moves the scales of a row's groups in a block to the best ones, and updates pull [B].

    gram [B, B]; values [S], of which the first is never taken; found [groups], indices of values; codes [B]. Fills
    moved [B] with the change of w_hat, and level [B] with the levels; seen [B] is memory.
    """
    width = len(codes) // len(found)
    moved[:] = np.float32(0)
    for j in range(len(codes)):
        level[j] = levels[codes[j]]
    for g in range(len(found)):
        a, b = g * width, (g + 1) * width
        bend, wish, code = products(gram, level[a:b], a, seen), dot(level[a:b], pull[a:b]), found[g]
        if bend <= 0:
            continue
        best = max(nearest_move(wish / bend, code, values), 1)
        step = values[best] - values[code]
        if step * (np.float32(2) * wish - step * bend) > 0:
            found[g] = best
            subtract(seen, step, pull)
            for j in range(a, b):
                moved[j] = step * level[j]


@njit(nogil=True, cache=True, error_model="numpy")
def settle_rows(gram, curvature, levels, values, found, codes, pull, moved, start, stop):  # type: ignore[no-untyped-def]
    """Moves scales and codes of rows start to stop in a block: found [N, groups], codes, pull and moved [N, B]."""
    ends, memory = halfway(levels), np.empty((3, codes.shape[1]), np.float32)
    scale = np.empty(found.shape[1], np.float32)
    for n in range(start, stop):
        move_scales(gram, levels, values, found[n], codes[n], pull[n], moved[n], memory[0], memory[1])
        for g in range(len(scale)):
            scale[g] = values[found[n, g]]
        fill_inverse(curvature, scale, memory[0], memory[1])
        move_codes(gram, memory[0], memory[1], levels, ends, codes[n], pull[n], moved[n], memory[2])


def settle(
    gram: Tensor, values: Tensor, levels: Tensor, found: Tensor, codes: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over all columns.

    Args:
        gram: H, float32 [K, K].
        values: float32 [S], ascending; the first is never taken.
        levels: float32 [L], ascending.
        found: int64 [N, G], which scale each group has.
        codes: uint8 [N, K].
        pull: float32 [N, K], (W - W_hat) H.

    Returns:
        New scales, codes and their pull.
    """
    found, codes, pull = (t.clone(memory_format=torch.contiguous_format) for t in (found, codes, pull))
    width, table = codes.shape[1] // found.shape[1], (levels.numpy(), values.numpy())
    for a in range(0, codes.shape[1], BLOCK):
        b = min(a + BLOCK, codes.shape[1])
        moved = torch.empty(len(codes), b - a)
        here, groups = gram[a:b, a:b].contiguous(), slice(a // width, b // width)
        arrays = found[:, groups].numpy(), codes[:, a:b].numpy(), pull[:, a:b].numpy(), moved.numpy()
        square, diagonal = here.numpy(), here.diagonal().numpy().copy()
        over_rows(partial(settle_rows, square, diagonal, *table, *arrays), len(codes))
        for elsewhere in (slice(0, a), slice(b, None)):
            pull[:, elsewhere].addmm_(moved, gram[a:b, elsewhere], alpha=-1)
    return found, codes, pull
