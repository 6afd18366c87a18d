"""Error-minimizing parameters for two-level grids: super-blocks whose groups have integer scales and minima.

    w_hat = (d * a_g) * l - (dmin * b_g)        l, a_g, b_g integers in given ranges; d and dmin fp16

Per super-block the search minimizes sum_j importance_j (w_j - w_hat_j)^2 over everything at once:

1. Every group gets its best free scale and minimum by a sweep over clipping ratios, each closed by least squares.
2. d is the step on whose multiples the free scales lie best, an error of a scale counting as much as it moves the
   group's error once the minimum has followed; then the same for dmin and the minima that have followed.
3. (d, dmin) by least squares for the codes found, then every group's (a, b) among its neighbours with codes rounded
   anew, and so on while the error falls.
4. Where ggml's result (`qtool.numerics.ggml.search`) is still better, step 3 goes on from there.

ggml (https://github.com/ggml-org/llama.cpp) does a narrower step 1, rounds the parameters once and never looks back.

Shape letters: N rows, C columns, S super-blocks of `SUPER` columns, G groups of a super-block, T trials of a sweep.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST, prepared, weights
from qtool.numerics.scales.sweep import (
    F32,
    STRETCH,
    free_offset,
    free_scale,
    half,
    offset_trials,
    shared_step,
    signed_trials,
)
from qtool.numerics.threads.parallel import over_rows

SUPER = 256
FLOOR = 1e-5
"""Least importance of a column relative to its super-block's mean, so that groups on dead inputs stay sane."""


Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""d, dmin, a, b; see `search`."""


class SuperBlock(NamedTuple):
    """One block type.

    Attributes:
        width: columns of a group.
        lowest, highest: first and last level.
        low, top: range of the integers a (and b, where there are minima).
        minima: whether groups have them.
    """

    width: int
    lowest: np.float32
    highest: np.float32
    low: np.float32
    top: np.float32
    minima: bool


class SuperBlockEffort(NamedTuple):
    """How hard to search.

    Attributes:
        trials: of a sweep in step 1.
        near: see `sweep.free_offset`.
        rounds: alternations of step 3.
        distance: how far a neighbour may be, of pairs in the first round.
    """

    trials: int
    near: np.float32
    rounds: int
    distance: int


EFFORT = {
    "fast": (SuperBlockEffort(32, F32(0.4), 0, 1), SuperBlockEffort(64, F32(0.75), 2, 1)),
    "default": (SuperBlockEffort(64, F32(0.75), 4, 2), SuperBlockEffort(64, F32(0.75), 3, 2)),
    "thorough": (SuperBlockEffort(160, F32(0.75), 8, 3), SuperBlockEffort(160, F32(0.75), 8, 3)),
}
"""For grids without and with minima. ggml spends a third of the time on the former, so fast spends less on them too."""


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def group_error(x, weight, scale, offset, lowest, highest):  # type: ignore[no-untyped-def]
    """Weighted squared error of a group [C] after rounding."""
    inverse, total = F32(1) / scale if scale != 0 else F32(0), F32(0)
    for j in range(len(x)):
        level = min(max(np.rint((x[j] - offset) * inverse), lowest), highest)
        error = x[j] - offset - scale * level
        total += weight[j] * error * error
    return total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def moments(x, weight, scale, offset, lowest, highest):  # type: ignore[no-untyped-def]
    """Sums over a group [C] of w, w l, w l^2, w r, w r l, where l is the level and r the error after rounding."""
    inverse = F32(1) / scale if scale != 0 else F32(0)
    w, wl, wll, wr, wrl = F32(0), F32(0), F32(0), F32(0), F32(0)
    for j in range(len(x)):
        level = min(max(np.rint((x[j] - offset) * inverse), lowest), highest)
        error = weight[j] * (x[j] - offset - scale * level)
        wr += error
        wrl += error * level
        w += weight[j]
        wl += weight[j] * level
        wll += weight[j] * level * level
    return w, wl, wll, wr, wrl


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def own_start(x, weight, reach, near, kind, table, sums, a, b, f):  # type: ignore[no-untyped-def]
    """Steps 1 and 2: fills a, b [G], returns (d, dmin). f [5, G] is scratch."""
    scale, offset, curvature, level, total = f[0], f[1], f[2], f[3], f[4]
    for g in range(len(a)):
        xg, wg = x[g * kind.width : (g + 1) * kind.width], weight[g * kind.width : (g + 1) * kind.width]
        rg = reach[g * kind.width : (g + 1) * kind.width]
        if kind.minima:
            scale[g], offset[g], curvature[g], level[g], total[g] = free_offset(
                xg, wg, rg, near, F32(0), table, kind.highest, sums
            )
        else:
            scale[g], curvature[g] = free_scale(xg, wg, rg, near, table, kind.lowest, kind.highest, sums)
    d = shared_step(scale, curvature, kind.low, kind.top, a)
    if not kind.minima:
        return d, F32(0)
    for g in range(len(a)):
        offset[g] = -min(offset[g] + level[g] * (scale[g] - d * a[g]), F32(0))
    return d, shared_step(offset, total, kind.low, kind.top, b)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def errors(x, weight, kind, d, dmin, a, b, error):  # type: ignore[no-untyped-def]
    """Fills the error of every group [G] and returns their sum."""
    total = F32(0)
    for g in range(len(a)):
        xg, wg = x[g * kind.width : (g + 1) * kind.width], weight[g * kind.width : (g + 1) * kind.width]
        error[g] = group_error(xg, wg, d * a[g], -dmin * b[g], kind.lowest, kind.highest)
        total += error[g]
    return total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def least_squares(x, weight, kind, d, dmin, a, b):  # type: ignore[no-untyped-def]
    """(d, dmin) in fp16 that suit the present codes best."""
    aa, ab, bb, ra, rb = F32(0), F32(0), F32(0), F32(0), F32(0)
    for g in range(len(a)):
        xg, wg = x[g * kind.width : (g + 1) * kind.width], weight[g * kind.width : (g + 1) * kind.width]
        w, wl, wll, wr, wrl = moments(xg, wg, d * a[g], -dmin * b[g], kind.lowest, kind.highest)
        aa += a[g] * a[g] * wll
        ab -= a[g] * b[g] * wl
        bb += b[g] * b[g] * w
        ra += a[g] * wrl
        rb -= b[g] * wr
    if bb == 0:
        return (half(d + ra / aa) if aa > 0 else d), dmin
    determinant = aa * bb - ab * ab
    if determinant <= F32(1e-6) * aa * bb:
        return d, dmin
    return half(d + (bb * ra - ab * rb) / determinant), half(dmin + (aa * rb - ab * ra) / determinant)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def move_integers(x, weight, kind, d, dmin, a, b, error, distance):  # type: ignore[no-untyped-def]
    """Moves every group's (a, b) to its best neighbour until there is none; updates error [G], returns its sum."""
    side, total = distance if kind.minima else 0, F32(0)
    for g in range(len(a)):
        xg, wg = x[g * kind.width : (g + 1) * kind.width], weight[g * kind.width : (g + 1) * kind.width]
        for _ in range(distance + 1):
            best, best_a, best_b = error[g], a[g], b[g]
            for i in range(-distance, distance + 1):
                for k in range(-side, side + 1):
                    p, q = a[g] + F32(i), b[g] + F32(k)
                    if p < kind.low or p > kind.top or q < kind.low or q > kind.top or (i == 0 and k == 0):
                        continue
                    found = group_error(xg, wg, d * p, -dmin * q, kind.lowest, kind.highest)
                    if found < best:
                        best, best_a, best_b = found, p, q
            if best >= error[g]:
                break
            error[g], a[g], b[g] = best, best_a, best_b
        total += error[g]
    return total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def improve(x, weight, kind, d, dmin, a, b, f, rounds, distance):  # type: ignore[no-untyped-def]
    """Step 3: updates a, b [G], returns (d, dmin, error). The first rows of f [5, G] are scratch."""
    error, other = f[0], f[1]
    total = errors(x, weight, kind, d, dmin, a, b, error)
    for turn in range(rounds):
        before = total
        near, near_min = least_squares(x, weight, kind, d, dmin, a, b)
        if errors(x, weight, kind, near, near_min, a, b, other) < total:
            d, dmin, error, other = near, near_min, other, error
        reach = distance if turn == 0 or not kind.minima else 1  # pairs have many neighbours, and later moves are small
        total = move_integers(x, weight, kind, d, dmin, a, b, error, reach)
        if total >= before * F32(0.9999):
            break
    return d, dmin, total


@njit(nogil=True, cache=True, error_model="numpy")
def super_block_rows(x, weight, reach, kind, effort, table, other, d, dmin, a, b, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, dmin [N, S] and a, b [N, S * G], float32, for rows start to stop. x [N, C], weight and reach [C].

    other: another result in the same four arrays, or empty ones.
    """
    groups = SUPER // kind.width
    c, f = np.zeros((2, groups), F32), np.empty((5, groups), F32)
    sums = np.empty((4, table.shape[1]), F32)
    for n in range(start, stop):
        for s in range(x.shape[1] // SUPER):
            xs, ws = x[n, s * SUPER : (s + 1) * SUPER], weight[s * SUPER : (s + 1) * SUPER]
            rs, least = reach[s * SUPER : (s + 1) * SUPER], F32(np.inf)
            for attempt in range(2 if len(other[0]) else 1):
                if attempt == 0:
                    p, q = own_start(xs, ws, rs, effort.near, kind, table, sums, c[0], c[1], f)
                else:
                    p, q = other[0][n, s], other[1][n, s]
                    for g in range(groups):
                        c[0, g], c[1, g] = other[2][n, s * groups + g], other[3][n, s * groups + g]
                    if errors(xs, ws, kind, p, q, c[0], c[1], f[0]) >= least:
                        break
                p, q, least = improve(xs, ws, kind, p, q, c[0], c[1], f, effort.rounds, effort.distance)
                d[n, s], dmin[n, s] = p, q
                for g in range(groups):
                    a[n, s * groups + g], b[n, s * groups + g] = c[0, g], c[1, g]


def search_super_blocks(
    x: Tensor, importance: Tensor | None, kind: SuperBlock, effort: SuperBlockEffort, other: Found | None = None
) -> Found:
    """Parameters of all super-blocks.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        kind: the block type.
        effort: how hard to search.
        other: parameters found another way (ggml's), from which the search goes on where they are the better start.

    Returns:
        (d, dmin, float32 [N, S] with values of fp16; a, b, float32 [N, S * G] with integer values), on the device of x.
    """
    trials = offset_trials(int(kind.highest), effort.trials)
    table = trials if kind.minima else signed_trials(int(kind.lowest), effort.trials)
    if x.is_cuda:
        from qtool.numerics.scales import cuda_kquant

        importances, reached = weights(x, importance, SUPER)
        tables = torch.from_numpy(table), torch.from_numpy(STRETCH)
        return cuda_kquant.search(x, importances.clamp_min(FLOOR), reached, tables, kind, effort, other)
    values, weight, reach = prepared(x, importance, SUPER)
    weight = np.maximum(weight, np.float32(FLOOR))
    supers, groups = x.shape[1] // SUPER, x.shape[1] // kind.width
    found = [np.zeros((x.shape[0], entries), np.float32) for entries in (supers, supers, groups, groups)]
    starts = tuple(p.cpu().numpy() for p in other or (torch.empty(0, 0),) * len(found))
    over_rows(
        lambda p, q: super_block_rows(values, weight, reach, kind, effort, table, starts, *found, p, q), len(values)
    )
    d, dmin, a, b = (torch.from_numpy(p).to(x.device) for p in found)
    return d, dmin, a, b
