"""The search of K-quants on CUDA devices, as a Triton kernel; see `kquant`, whose steps these are, one by one.

A program takes some super-blocks; numbers of a super-block are [count], of a group [count * groups], and of weights
[count * groups, W] tensors.

Shape letters: N rows, C columns, S super-blocks of a row, G groups of a super-block of W columns, T trials.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from qtool.numerics.scales.cuda_search import rounded
from qtool.numerics.scales.cuda_sweep import extreme_of, free_offset, free_scale, group_error, half

COUNT = 4
"""Super-blocks of a program."""
SUPER = 256
"""Columns of a super-block."""
SuperBlock = tuple[int, np.float32, np.float32, np.float32, np.float32, bool]
SuperBlockEffort = tuple[int, np.float32, int, int]
STRETCHES = tl.constexpr(16)


@triton.jit
def spread(x, count: tl.constexpr, groups: tl.constexpr):  # type: ignore[no-untyped-def]
    """A super-block's number to each of its groups."""
    return tl.reshape(tl.broadcast_to(x[:, None], (count, groups)), (count * groups,))


@triton.jit
def gathered(x, count: tl.constexpr, groups: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of groups over their super-block."""
    return tl.sum(tl.reshape(x, (count, groups)), 1)


@triton.jit
def shared_step(x, weight, stretch, low, top, count: tl.constexpr, groups: tl.constexpr):  # type: ignore[no-untyped-def]
    """(d of each super-block, integers of its groups); see `sweep.shared_step`."""
    extreme = extreme_of(tl.reshape(x, (count, groups)), 1)
    best, d = tl.full([count], float("inf"), tl.float32), tl.zeros([count], tl.float32)
    for i in range(STRETCHES):
        t = extreme / (tl.where(low < 0, low, top) * tl.load(stretch + i))
        inverse = tl.where(t != 0, 1.0 / tl.where(t != 0, t, 1.0), 0.0)
        error = x - spread(t, count, groups) * rounded(x * spread(inverse, count, groups), low, top)
        found = gathered(weight * error * error, count, groups)
        best, d = tl.minimum(found, best), tl.where(found < best, t, d)
    d = half(d)
    wide = spread(d, count, groups)
    return d, tl.where(wide != 0, rounded(x / tl.where(wide != 0, wide, 1.0), low, top), 0.0)


@triton.jit
def least_squares(  # type: ignore[no-untyped-def]
    x, w, d, dmin, a, b, lowest, highest, minima: tl.constexpr, count: tl.constexpr, groups: tl.constexpr
):  # fmt: skip
    """(d, dmin) in fp16 that suit the present codes best; see `kquant.least_squares`."""
    scale, offset = spread(d, count, groups) * a, -spread(dmin, count, groups) * b
    inverse = tl.where(scale != 0, 1.0 / tl.where(scale != 0, scale, 1.0), 0.0)
    moved = x - offset[:, None]
    level = rounded(moved * inverse[:, None], lowest, highest)
    error = w * (moved - scale[:, None] * level)
    aa = gathered(a * a * tl.sum(w * level * level, 1), count, groups)
    ra = gathered(a * tl.sum(error * level, 1), count, groups)
    alone = half(d + tl.where(aa > 0, ra / tl.where(aa > 0, aa, 1.0), 0.0))
    near, near_min = tl.where(aa > 0, alone, d), dmin
    if minima:
        ab = -gathered(a * b * tl.sum(w * level, 1), count, groups)
        bb = gathered(b * b * tl.sum(w, 1), count, groups)
        rb = -gathered(b * tl.sum(error, 1), count, groups)
        determinant = aa * bb - ab * ab
        sound = determinant > 1e-6 * aa * bb
        safe = tl.where(sound, determinant, 1.0)
        both, both_min = half(d + (bb * ra - ab * rb) / safe), half(dmin + (aa * rb - ab * ra) / safe)
        near = tl.where(bb == 0, near, tl.where(sound, both, d))
        near_min = tl.where((bb != 0) & sound, both_min, dmin)
    return near, near_min


@triton.jit
def move_integers(  # type: ignore[no-untyped-def]
    x, w, scale, minimum, a, b, error, active, reach, lowest, highest, low, top, minima: tl.constexpr
):  # fmt: skip
    """(a, b, errors) of groups after moves to their best neighbours; see `kquant.move_integers`."""
    side = reach if minima else 0
    span, spans = 2 * reach + 1, 2 * side + 1
    moving, turn = active, 0
    while turn <= reach:
        best, best_a, best_b = error, a, b
        for i in range(span * spans):
            p, q = a + (i // spans - reach), b + (i % spans - side)
            allowed = moving & (p >= low) & (p <= top) & (q >= low) & (q <= top)
            found = group_error(x, w, scale * p, -minimum * q, lowest, highest)
            better = allowed & (found < best)
            best = tl.where(better, found, best)
            best_a, best_b = tl.where(better, p, best_a), tl.where(better, q, best_b)
        moving = best < error
        error, a, b = best, best_a, best_b
        turn = turn + 1 if tl.sum(moving.to(tl.int32)) > 0 else reach + 1
    return a, b, error


@triton.jit
def improve(  # type: ignore[no-untyped-def]
    x, w, d, dmin, a, b, active, rounds, distance, lowest, highest, low, top,
    minima: tl.constexpr, count: tl.constexpr, groups: tl.constexpr,
):  # fmt: skip
    """(d, dmin, a, b, error) of the super-blocks that are active; see `kquant.improve`."""
    error = group_error(x, w, spread(d, count, groups) * a, -spread(dmin, count, groups) * b, lowest, highest)
    total, turn = gathered(error, count, groups), 0
    while turn < rounds:
        before = total
        near, near_min = least_squares(x, w, d, dmin, a, b, lowest, highest, minima, count, groups)
        other = group_error(
            x, w, spread(near, count, groups) * a, -spread(near_min, count, groups) * b, lowest, highest
        )
        better = active & (gathered(other, count, groups) < total)
        d, dmin = tl.where(better, near, d), tl.where(better, near_min, dmin)
        error = tl.where(spread(better.to(tl.int32), count, groups) > 0, other, error)
        reach = distance if turn == 0 or not minima else 1
        moving = spread(active.to(tl.int32), count, groups) > 0
        scale, minimum = spread(d, count, groups), spread(dmin, count, groups)
        a, b, error = move_integers(x, w, scale, minimum, a, b, error, moving, reach, lowest, highest, low, top, minima)
        total = gathered(error, count, groups)
        active = active & (total < before * 0.9999)
        turn = turn + 1 if tl.sum(active.to(tl.int32)) > 0 else rounds
    return d, dmin, a, b, total


@triton.jit
def search_kernel(  # type: ignore[no-untyped-def]
    x, weight, reach, table, stretch, other_d, other_dmin, other_a, other_b, out_d, out_dmin, out_a, out_b,
    blocks, period, trials, near, rounds, distance, lowest, highest, low, top,
    others: tl.constexpr, minima: tl.constexpr, count: tl.constexpr, groups: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """`kquant.super_block_rows`. x [blocks, G W]; weight, reach [period, G W]; d, dmin [blocks]; a, b [blocks, G]."""
    block = tl.program_id(0) * count + tl.arange(0, count)
    group = tl.program_id(0) * count * groups + tl.arange(0, count * groups)
    j = tl.arange(0, width)
    inside, there = block < blocks, group < blocks * groups
    v = tl.load(x + group.to(tl.int64)[:, None] * width + j[None, :], there[:, None], 0.0)
    place = (group % (period * groups))[:, None] * width + j[None, :]
    w = tl.load(weight + place)
    r = tl.load(reach + place)
    if minima:
        scale, offset, curvature, level, total = free_offset(v, w, r, near, table, trials, highest)
        d, a = shared_step(scale, curvature, stretch, low, top, count, groups)
        least = -tl.minimum(offset + level * (scale - spread(d, count, groups) * a), 0.0)
        dmin, b = shared_step(least, total, stretch, low, top, count, groups)
    else:
        scale, curvature = free_scale(v, w, r, near, table, trials, lowest, highest)
        d, a = shared_step(scale, curvature, stretch, low, top, count, groups)
        dmin, b = d * 0, a * 0
    d, dmin, a, b, error = improve(
        v, w, d, dmin, a, b, inside, rounds, distance, lowest, highest, low, top, minima, count, groups
    )
    if others:
        p, q = tl.load(other_d + block, inside, 0.0), tl.load(other_dmin + block, inside, 0.0)
        e, f = tl.load(other_a + group, there, 0.0), tl.load(other_b + group, there, 0.0)
        start = group_error(v, w, spread(p, count, groups) * e, -spread(q, count, groups) * f, lowest, highest)
        better = inside & (gathered(start, count, groups) < error)
        if tl.sum(better.to(tl.int32)) > 0:
            p, q, e, f, _ = improve(
                v, w, p, q, e, f, better, rounds, distance, lowest, highest, low, top, minima, count, groups
            )
            d, dmin = tl.where(better, p, d), tl.where(better, q, dmin)
            wide = spread(better.to(tl.int32), count, groups) > 0
            a, b = tl.where(wide, e, a), tl.where(wide, f, b)
    tl.store(out_d + block, d, inside)
    tl.store(out_dmin + block, dmin, inside)
    tl.store(out_a + group, a, there)
    tl.store(out_b + group, b, there)


def search(
    x: Tensor,
    weight: Tensor,
    reach: Tensor,
    tables: tuple[Tensor, Tensor],
    grid: SuperBlock,
    effort: SuperBlockEffort,
    other: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, dmin [N, S], a, b [N, S G]); see `kquant.search`.

    Args:
        x: float32 [N, C].
        weight: float32 [C].
        reach: float32 [C].
        tables: trials, float32 [2, T], and `sweep.STRETCH`.
        grid: a `kquant.SuperBlock`.
        effort: a `kquant.SuperBlockEffort`.
        other: parameters found another way.
    """
    values, *rest = (t.to(x.device, torch.float32).contiguous() for t in (x, weight, reach, *tables))
    width, *limits, minima = grid
    blocks, period, groups = x.numel() // SUPER, x.shape[1] // SUPER, SUPER // width
    d, dmin = values.new_empty(2, len(x), period)
    a, b = values.new_empty(2, len(x), period * groups)
    starts = [t.to(x.device, torch.float32).contiguous() for t in other or (d, dmin, a, b)]
    ends, (trials, near, rounds, distance) = [float(limit) for limit in limits], effort
    search_kernel[(cdiv(blocks, COUNT),)](
        values, *rest, *starts, d, dmin, a, b, blocks, period, trials, float(near), rounds, distance, *ends,
        other is not None, minima, COUNT, groups, width,
    )  # fmt: skip
    return d, dmin, a, b
