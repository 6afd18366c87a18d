"""Rounds parameters to two-level grids on CUDA devices, as a Triton kernel; see `kquant_refit`, whose steps these are.

A program takes a row: its pull and its integers, a and then b, are tensors [P] in registers.

Shape letters: N rows, S super-blocks, G groups per row, P = G or, with minima, 2 G parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qtool.numerics.scales.cuda_sweep import half

MAGIC = tl.constexpr(12582912.0)
FAR = tl.constexpr(4096.0)
"""Integers lie far below; what is rounded is cut off here."""


@triton.jit
def whole(x):  # type: ignore[no-untyped-def]
    """x rounded, ties even."""
    return (tl.minimum(tl.maximum(x, -FAR), FAR) + MAGIC) - MAGIC


@triton.jit
def at(x, i, place):  # type: ignore[no-untyped-def]
    """Entry i of a tensor whose entries' numbers are `place`."""
    return tl.sum(tl.where(place == i, x, 0.0), 0)


@triton.jit
def move_step(curvature, stride, pull, integers, place, first, per, step, size):  # type: ignore[no-untyped-def]
    """(pull, step) after the best move of the step of `per` parameters from `first` on; see `move_step`."""
    inside = (place >= first) & (place < first + per)
    multiples = tl.where(inside, integers, 0.0)
    wish = tl.sum(multiples * pull, 0)
    bent = tl.zeros_like(pull)
    for i in range(per):
        row = tl.load(curvature + (first + i) * stride + place, place < size, 0.0)
        bent += at(multiples, first + i, place) * row
    bend = tl.sum(multiples * bent, 0)
    move = half(step + tl.where(bend > 0, wish / tl.where(bend > 0, bend, 1.0), 0.0)) - step
    good = (bend > 0) & (move * (2 * wish - move * bend) > 0)
    move = tl.where(good, move, 0.0)
    return pull - move * bent, step + move


@triton.jit
def best_pair(cs, co, cross, pull_s, pull_o, a, b, d, dmin, low, top, minima: tl.constexpr):  # type: ignore[no-untyped-def]
    """(gain, moves of a and b) of the best move of a pair; see `kquant_refit.move_pair`."""
    free_o = co > 0
    safe_o = tl.where(free_o, co, 1.0)
    rest = cs - tl.where(free_o, cross * cross / safe_o, 0.0)
    free, can_o = (d != 0) & (rest > 0), free_o & (dmin != 0)
    missing = pull_s - tl.where(free_o, cross * pull_o / safe_o, 0.0)
    center = tl.where(free, whole(missing / tl.where(free, rest * d, 1.0)), 0.0)
    best, best_a, best_b = cs * 0, cs * 0, cs * 0
    for i in tl.static_range(3):
        move = tl.minimum(tl.maximum(a + center + (i - 1), low), top) - a
        more, less = d * move, cs * 0
        if minima:
            wish = (pull_o - more * cross) / tl.where(can_o, co * -dmin, 1.0)
            less = tl.where(can_o, tl.minimum(tl.maximum(b + whole(wish), low), top) - b, 0.0)
        o = -dmin * less
        gain = more * (2 * pull_s - more * cs) + o * (2 * pull_o - o * co - 2 * more * cross)
        better = gain > best
        best = tl.where(better, gain, best)
        best_a, best_b = tl.where(better, move, best_a), tl.where(better, less, best_b)
    return best, best_a, best_b


@triton.jit
def settle_kernel(  # type: ignore[no-untyped-def]
    curvature, pulls, ds, dmins, a_s, b_s, supers, groups, low, top, sweeps,
    minima: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Updates d, dmin [N, S] and a, b [N, G] of a row; pulls [N, P], curvature [N, P, P]."""
    n = tl.program_id(0).to(tl.int64)
    size = 2 * groups if minima else groups
    place = tl.arange(0, block)
    bend = curvature + n * size * size
    pull = tl.load(pulls + n * size + place, place < size, 0.0)
    integers = tl.load(a_s + n * groups + place, place < groups, 0.0)
    if minima:
        late = (place >= groups) & (place < size)
        integers = tl.where(late, tl.load(b_s + n * groups + place - groups, late, 0.0), integers)
    per = groups // supers
    turn = 0
    while turn < sweeps:
        changes = 0
        for s in range(supers):
            d = tl.load(ds + n * supers + s)
            pull, d = move_step(bend, size, pull, integers, place, s * per, per, d, size)
            dmin = d * 0
            if minima:
                dmin = tl.load(dmins + n * supers + s)
                pull, dmin = move_step(bend, size, pull, integers, place, groups + s * per, per, -dmin, size)
                dmin = -dmin
                tl.store(dmins + n * supers + s, dmin)
            tl.store(ds + n * supers + s, d)
            for g in range(s * per, (s + 1) * per):
                other = groups + g if minima else g
                row = tl.load(bend + g * size + place, place < size, 0.0)
                cs, pull_s, a = tl.load(bend + g * size + g), at(pull, g, place), at(integers, g, place)
                co, cross, pull_o, b = cs * 0, cs * 0, cs * 0, cs * 0
                if minima:
                    co, cross = tl.load(bend + other * size + other), tl.load(bend + g * size + other)
                    pull_o, b = at(pull, other, place), at(integers, other, place)
                best, best_a, best_b = best_pair(cs, co, cross, pull_s, pull_o, a, b, d, dmin, low, top, minima)
                if best > 0:
                    pull -= d * best_a * row
                    integers += tl.where(place == g, best_a, 0.0)
                    if minima:
                        pull -= -dmin * best_b * tl.load(bend + other * size + place, place < size, 0.0)
                        integers += tl.where(place == other, best_b, 0.0)
                    changes += 1
        turn = turn + 1 if changes > 0 else sweeps
    tl.store(a_s + n * groups + place, integers, place < groups)
    if minima:
        tl.store(b_s + n * groups + place - groups, integers, (place >= groups) & (place < size))


def refit_multiples(
    curvature: Tensor, pull: Tensor, params: tuple[Tensor, Tensor, Tensor, Tensor], limits: tuple[int, int], sweeps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kquant_refit.refit_multiples`."""
    d, dmin, a, b = (p.to(torch.float32).contiguous().clone() for p in params)
    rows, size = pull.shape
    settle_kernel[(rows,)](
        curvature.contiguous(), pull.contiguous(), d, dmin, a, b, d.shape[1], a.shape[1], float(limits[0]),
        float(limits[1]), sweeps, size > a.shape[1], next_power_of_2(size), num_warps=1 if size <= 1024 else 2,
    )  # fmt: skip
    return d, dmin, a, b
