"""Two planes of codes at once: w = a T[i] + b S[j], the best pair of codes for every weight, the best pair of scales.

    minimize  sum_j (x_j - a T[i_j] - b S[k_j])^2     over a, b and codes, group by group

By turns: of all pairs of levels, each weight takes the nearest; then (a, b) solve two normal equations, with a ridge
that keeps them solvable (PTQTP, https://arxiv.org/abs/2509.16989). Turns end in a local optimum, so they begin from
several ratios of the scales, and each group keeps its best.

Shape letters: M groups, P columns of a group, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.threads.parallel import over_rows

RIDGE = np.float32(1e-4)
"""Added to the diagonal of a group's equations, relative to the number of its columns."""


@njit(nogil=True, cache=True)
def closest(x, a, b, first, second):  # type: ignore[no-untyped-def]
    """(i, k, squared error) of the nearest pair of levels."""
    least, i, k = np.float32(np.inf), 0, 0
    for p in range(len(first)):
        for q in range(len(second)):
            d = x - a * first[p] - b * second[q]
            if d * d < least:
                least, i, k = d * d, p, q
    return i, k, least


@njit(nogil=True, cache=True)
def improved(v, a, b, first, second, turns):  # type: ignore[no-untyped-def]
    """(a, b, squared error) behind some turns, fewer if they settle."""
    before, zero = np.float32(np.inf), np.float32(0.0)
    for _ in range(turns):
        tt, ss, ts, tx, sx, error = zero, zero, zero, zero, zero, zero
        for x in v:
            i, k, least = closest(x, a, b, first, second)
            t, s = first[i], second[k]
            tt, ss, ts, tx, sx, error = tt + t * t, ss + s * s, ts + t * s, tx + t * x, sx + s * x, error + least
        if not error < before * np.float32(0.99999):
            break
        before, ridge = error, RIDGE * np.float32(len(v))
        tt, ss = tt + ridge, ss + ridge
        tx, sx = tx + ridge * a, sx + ridge * b
        root = tt * ss - ts * ts
        a, b = (ss * tx - ts * sx) / root, (tt * sx - ts * tx) / root
    return a, b, before


@njit(nogil=True, cache=True)
def pair_rows(x, first, second, starts, turns, scales, start, stop):  # type: ignore[no-untyped-def]
    """Fills scales [M, 2] for groups start to stop of x [M, P]; starts [., 2] in units of the root mean square."""
    for m in range(start, stop):
        size = np.float32(0.0)
        for v in x[m]:
            size += v * v
        size, least = np.sqrt(size / np.float32(x.shape[1])), np.float32(np.inf)
        scales[m] = 0
        for s in range(len(starts) if size > 0 else 0):
            a, b, error = improved(x[m] / size, starts[s, 0], starts[s, 1], first, second, turns)
            if error < least:
                least, scales[m, 0], scales[m, 1] = error, a * size, b * size


@njit(nogil=True, cache=True)
def code_rows(x, scales, first, second, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes uint8 [2, M, P] for groups start to stop."""
    for m in range(start, stop):
        for j in range(x.shape[1]):
            codes[0, m, j], codes[1, m, j], _ = closest(x[m, j], scales[m, 0], scales[m, 1], first, second)


def pair_scales(x: Tensor, levels: tuple[Tensor, Tensor], starts: Sequence[tuple[float, float]], turns: int) -> Tensor:
    """The best scales of both planes that are found, float32 [M, 2].

    Args:
        x: float32 [M, P], finite.
        levels: of the planes, float32 [L] each.
        starts: scales to begin from, in units of a group's root mean square.
        turns: most of them.
    """
    scales = np.empty((len(x), 2), np.float32)
    arrays = [t.contiguous().cpu().numpy() for t in (x, *levels)]
    over_rows(lambda a, b: pair_rows(*arrays, np.array(starts, np.float32), turns, scales, a, b), len(x))
    return torch.from_numpy(scales).to(x.device)


def pair_codes(x: Tensor, scales: Tensor, levels: tuple[Tensor, Tensor]) -> Tensor:
    """The nearest pair of codes of every weight, uint8 [2, M, P]; arguments as in `pair_scales`, scales [M, 2]."""
    codes = np.empty((2, *x.shape), np.uint8)
    arrays = [t.contiguous().cpu().numpy() for t in (x, scales, *levels)]
    over_rows(lambda a, b: code_rows(*arrays, codes, a, b), len(x))
    return torch.from_numpy(codes).to(x.device)
