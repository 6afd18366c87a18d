"""Rounds wanted scales and minima to two-level grids in the metric of a quadratic objective.

The parameters of a row are p = (d * a_g for all groups, then -dmin * b_g), wanted is p*, and what counts is

    (p - p*)^T C (p - p*)

Starting from the present parameters, each step d, dmin and each pair (a_g, b_g) in turn moves to its best value given
all others. Groups are coupled by C, so that one makes up for what another could not reach.

Shape letters: N rows, S super-blocks, G groups per row, P = G or, with minima, 2 G parameters.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.sweep import F32, half
from qtool.numerics.threads.parallel import over_rows

SWEEPS = 8


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def move_step(curvature, pull, multiples, first, step):  # type: ignore[no-untyped-def]
    """The best step for the parameters from `first` on, which are step * multiples [G / S]; updates pull [P]."""
    wish, bend = F32(0), F32(0)
    for i in range(len(multiples)):
        wish += multiples[i] * pull[first + i]
        for k in range(len(multiples)):
            bend += multiples[i] * multiples[k] * curvature[first + i, first + k]
    if bend <= 0:
        return step
    move = half(step + wish / bend) - step
    if move * (F32(2) * wish - move * bend) <= 0:
        return step
    for i in range(len(multiples)):
        for k in range(len(pull)):
            pull[k] -= move * multiples[i] * curvature[first + i, k]
    return step + move


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def move_pair(curvature, pull, g, other, d, dmin, low, top, pair):  # type: ignore[no-untyped-def]
    """Moves the pair (a, b) of group g, whose minimum is parameter `other` (g: none); True if that was a gain.

    Around the best real a three integers are tried, each with the b that is best for it.
    """
    cs, co, cross = curvature[g, g], curvature[other, other], curvature[g, other] if other != g else F32(0)
    rest = cs - cross * cross / co if co > 0 else cs
    free = d != 0 and rest > 0
    center = (
        np.rint((pull[g] - (cross * pull[other] / co if other != g and co > 0 else F32(0))) / (rest * d))
        if free
        else F32(0)
    )
    best, best_s, best_o = F32(0), F32(0), F32(0)
    for i in range(-1, 2):
        move = min(max(pair[0] + center + F32(i), low), top) - pair[0]
        s, o = d * move, F32(0)
        if other != g and dmin != 0 and co > 0:
            wish = (pull[other] - s * cross) / (co * -dmin)
            o = -dmin * (min(max(pair[1] + np.rint(wish), low), top) - pair[1])
        gain = s * (F32(2) * pull[g] - s * cs) + o * (F32(2) * pull[other] - o * co - F32(2) * s * cross)
        if gain > best:
            best, best_s, best_o = gain, s, o
    if best <= 0:
        return False
    pair[0] += np.rint(best_s / d) if d != 0 else F32(0)
    pair[1] -= np.rint(best_o / dmin) if dmin != 0 else F32(0)
    for p in range(len(pull)):
        pull[p] -= best_s * curvature[g, p] + best_o * curvature[other, p]
    return True


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def settle_rows(curvature, pulls, minima, low, top, d, dmin, a, b, start, stop):  # type: ignore[no-untyped-def]
    """Updates d, dmin [N, S] and a, b [N, G] of rows start to stop; pulls [N, P] is C (p* - p), curvature [N, P, P]."""
    groups = a.shape[1]
    per = groups // d.shape[1]
    pair = np.empty(2, F32)
    for n in range(start, stop):
        bend, pull = curvature[n], pulls[n]
        for _ in range(SWEEPS):
            changes = 0
            for s in range(d.shape[1]):
                span = slice(s * per, (s + 1) * per)
                d[n, s] = move_step(bend, pull, a[n, span], s * per, d[n, s])
                if minima:
                    dmin[n, s] = -move_step(bend, pull, b[n, span], groups + s * per, -dmin[n, s])
                for g in range(s * per, (s + 1) * per):
                    pair[0], pair[1] = a[n, g], b[n, g]
                    other = groups + g if minima else g
                    if move_pair(bend, pull, g, other, d[n, s], dmin[n, s], low, top, pair):
                        a[n, g], b[n, g] = pair[0], pair[1]
                        changes += 1
            if changes == 0:
                break


def refit_multiples(
    curvature: Tensor, pull: Tensor, params: tuple[Tensor, Tensor, Tensor, Tensor], limits: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Better parameters of all rows.

    Args:
        curvature: float32 [N, P, P], C.
        pull: float32 [N, P], C (p* - p).
        params: d and dmin, float32 [N, S] with values of fp16; a and b, float32 [N, G] with integer values. Without
            minima (P = G) dmin and b are ignored.
        limits: of a and b.

    Returns:
        The new params.
    """
    if pull.is_cuda:
        from qtool.numerics.solving import cuda_refit

        return cuda_refit.refit_multiples(curvature, pull, params, limits, SWEEPS)
    bend = curvature.contiguous().cpu().numpy()
    found = [t.cpu().numpy().copy() for t in (pull, *params)]
    low, top, minima = np.float32(limits[0]), np.float32(limits[1]), pull.shape[1] > params[2].shape[1]
    over_rows(lambda p, q: settle_rows(bend, found[0], minima, low, top, *found[1:], p, q), len(bend))
    return tuple(torch.from_numpy(p).to(pull.device) for p in found[1:])  # type: ignore[return-value]
