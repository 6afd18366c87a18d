"""Scales for a table of levels that are not evenly spaced: the 16 signed bytes of ggml's IQ4 types.

Blocks of columns share a scale d, and each group of a block has an integer multiplier m of it:

    minimize  sum_j importance_j (x_j - d * m_g * T[code_j])^2     over d, m_g and codes

A group's own best scale comes from a sweep, each step of which rounds the group and closes with weighted least squares.
Then d is chosen among many by the parabolas that the groups' errors are near their optimum, and (d, m) are improved in
turns with the codes. ggml's own encoder (quantize_row_iq4_nl_impl in ggml-quants.c,
https://github.com/ggml-org/llama.cpp) runs beside, and where its block is better, it stays.

Shape letters: N rows, C columns, B columns of a block, S blocks of a row (C / B), G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import importances, searchable
from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.sweep import half
from qtool.numerics.threads.parallel import over_rows


class TableEffort(NamedTuple):
    """How much is tried.

    Attributes:
        steps: of a group's sweep, per sign.
        multipliers: steps of the sweep over d, per sign.
        starts: values of d that are followed up.
        rounds: turns of (m, codes) and d for each of them.
        near: multipliers tried on both sides of the rounded one.
    """

    steps: int
    multipliers: int
    starts: int
    rounds: int
    near: int


EFFORT = {
    "fast": TableEffort(9, 24, 1, 1, 0),
    "default": TableEffort(20, 64, 2, 2, 1),
    "thorough": TableEffort(60, 256, 6, 4, 2),
}


@njit(nogil=True, cache=True, inline="always")
def look_up(x, table, low):  # type: ignore[no-untyped-def]
    """The level nearest to x. `table` [entries] holds it for every half step from `low` on."""
    at = min(max((x - low) * np.float32(2.0), np.float32(0.0)), np.float32(len(table) - 1))
    return table[max(np.int32(at), np.int32(0))]  # NaN, of scales that are infinite, becomes a negative integer


@njit(nogil=True, cache=True, fastmath=FAST)
def products(v, weight, inverse, table, low):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) for a group rounded at a scale."""
    xl, ll = np.float32(0.0), np.float32(0.0)
    for j in range(len(v)):
        level = look_up(v[j] * inverse, table, low)
        xl += weight[j] * v[j] * level
        ll += weight[j] * level * level
    return xl, ll


@njit(nogil=True, cache=True, fastmath=FAST)
def error(v, weight, scale, table, low):  # type: ignore[no-untyped-def]
    """Weighted squared error of a group rounded at a scale."""
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    total = np.float32(0.0)
    for j in range(len(v)):
        d = v[j] - scale * look_up(v[j] * inverse, table, low)
        total += weight[j] * d * d
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
def sweep(v, weight, reach, table, low, high, steps):  # type: ignore[no-untyped-def]
    """(scale, xl, ll) of the best step of a group's sweep: its largest weight lands short of the table's end or beyond.

    Columns that hardly count are shrunk by `reach` as the sweep goes on, so that they do not set the scale.
    """
    far, near = np.float32(0.0), np.float32(0.0)
    for j in range(len(v)):
        far, near = max(far, abs(v[j])), max(near, abs(v[j]) * reach[j])
    best_xl, best_ll = np.float32(0.0), np.float32(0.0)
    best = np.float32(0.0)
    if near > 0:
        for i in range(steps):
            t = np.float32(i) / np.float32(steps - 1)
            extent = far + (near - far) * t
            for end in (low, high):
                xl, ll = products(v, weight, end * (np.float32(0.84) + np.float32(0.4) * t) / extent, table, low)
                if ll > 0 and xl * xl > best * ll:
                    best, best_xl, best_ll = xl * xl / ll, xl, ll
    return (best_xl / best_ll if best_ll > 0 else np.float32(0.0)), best_xl, best_ll


@njit(nogil=True, cache=True, inline="always")
def nearest_multiplier(x, limit):  # type: ignore[no-untyped-def]
    """x rounded into [-limit, limit - 1]."""
    return min(max(np.rint(x), -limit), limit - np.float32(1.0))


@njit(nogil=True, cache=True, fastmath=FAST)
def propose(scale, ll, limit, steps, found):  # type: ignore[no-untyped-def]
    """Fills `found` with the most promising values of d, by the parabolas ll_g (d m_g - scale_g)^2.

    Each puts the largest scale somewhere between half of the multipliers' range and its end, on either side.
    """
    largest = np.float32(0.0)
    for g in range(len(scale)):
        if abs(scale[g]) > abs(largest):
            largest = scale[g]
    costs = np.full(len(found), np.inf, np.float32)
    found[:] = 0
    for i in range(2 * steps):
        end = limit * (np.float32(0.5) + np.float32(0.5) * np.float32(i // 2 + 1) / np.float32(steps))
        d = largest / (-end if i % 2 == 0 else end - np.float32(1.0))
        cost = np.float32(0.0)
        for g in range(len(scale)):
            miss = d * nearest_multiplier(scale[g] / d, limit) - scale[g] if d != 0 else scale[g]
            cost += ll[g] * miss * miss
        worst = 0
        for k in range(len(found)):
            if costs[k] > costs[worst]:
                worst = k
        if cost < costs[worst]:
            costs[worst], found[worst] = cost, d


@njit(nogil=True, cache=True, fastmath=FAST)
def improve_multipliers(v, weight, d, limit, rounds, near, table, low, m):  # type: ignore[no-untyped-def]
    """Improves d and the multipliers m [groups of the block] in turns; returns (d, error) with d as fp16 stores it."""
    width = len(v) // len(m)
    for turn in range(rounds + 1):
        d = half(d)
        total, top, bottom = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for g in range(len(m)):
            x, w = v[g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
            least, center = np.float32(np.inf), m[g]
            for step in range(-near, near + 1):
                tried = center if step == 0 else min(max(center + np.float32(step), -limit), limit - np.float32(1.0))
                cost = error(x, w, d * tried, table, low)
                if cost < least:
                    least, m[g] = cost, tried
            total += least
            if turn < rounds and d * m[g] != 0:
                xl, ll = products(x, w, np.float32(1.0) / (d * m[g]), table, low)
                top += m[g] * xl
                bottom += m[g] * m[g] * ll
        if turn < rounds and bottom > 0:
            d = top / bottom
    return d, total


@njit(nogil=True, cache=True, fastmath=FAST)
def multiply(scale, d, limit, m):  # type: ignore[no-untyped-def]
    """Fills m [groups of the block] with the multipliers of d that are nearest to the scales; one alone is 1."""
    for g in range(len(m)):
        m[g] = 1 if len(m) == 1 else nearest_multiplier(scale[g] / d, limit) if d != 0 else 0


@njit(nogil=True, cache=True, fastmath=FAST)
def table_rows(x, weight, reach, table, low, high, limit, effort, other, d, m, start, stop):  # type: ignore[no-untyped-def]
    """Fills d [N, S] and m [N, G] for rows start to stop. x [N, C]; weight, reach [C].

    other: d and m found another way (ggml's), from which the search goes on where they are the better start.
    """
    blocks = d.shape[1]
    width, groups = x.shape[1] // m.shape[1], m.shape[1] // blocks
    columns = width * groups
    steps, multipliers, starts, rounds, near = effort
    scale, ll, tried = np.empty(groups, np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
    promising = np.empty(starts if groups > 1 else 1, np.float32)
    for n in range(start, stop):
        for s in range(blocks):
            part = slice(s * columns, (s + 1) * columns)
            v, w, kept = x[n, part], weight[part], m[n, s * groups : (s + 1) * groups]
            least = np.float32(np.inf)
            if len(other[0]):
                kept[:] = other[1][n, s * groups : (s + 1) * groups]
                d[n, s], least = improve_multipliers(v, w, other[0][n, s], limit, 0, 0, table, low, kept)
            for g in range(groups):
                a, b = g * width, (g + 1) * width
                scale[g], _, ll[g] = sweep(
                    v[a:b], w[a:b], reach[s * columns + a : s * columns + b], table, low, high, steps
                )
            promising[0] = scale[0]
            if groups > 1:
                propose(scale, ll, limit, multipliers, promising)
            for candidate in promising:
                multiply(scale, candidate, limit, tried)
                found, cost = improve_multipliers(
                    v, w, candidate, limit, rounds, near if groups > 1 else 0, table, low, tried
                )
                if cost < least:
                    least, d[n, s] = cost, found
                    kept[:] = tried


def half_steps(levels: Tensor) -> np.ndarray:
    """The table of `look_up` for levels [L], float32: entry i is the level of what lies in low + [i, i + 1) / 2."""
    middles = (levels[1:] + levels[:-1]) / 2
    halves = torch.arange(float(levels[0]), float(levels[-1]) + 0.5, 0.5)
    return levels[torch.bucketize(halves, middles, right=True)].numpy()


def table_scales(
    x: Tensor,
    importance: Tensor | None,
    levels: Tensor,
    groups: tuple[int, int],
    limit: int,
    effort: TableEffort,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(d, multipliers) of every block.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        levels: float32 [L], integers or half integers, ascending, from below zero to above.
        groups: columns of a group, and groups of a block; one alone has the multiplier 1.
        limit: multipliers lie in [-limit, limit - 1].
        effort: how much is tried.
        other: d in fp16 and multipliers found another way (ggml's), to be improved where they are better.

    Returns:
        (float32 [N, S] of values that fp16 holds, float32 [N, G] of integers), on the device of x.
    """
    width, columns = groups[0], groups[0] * groups[1]
    weight, reach = column_weights(importance, x.shape[1], width, columns)
    d, m = (np.zeros((len(x), x.shape[1] // extent), np.float32) for extent in (columns, width))
    arrays = (searchable(x), weight.numpy(), reach.numpy(), half_steps(levels))
    ends = tuple(np.float32(value) for value in (levels[0], levels[-1], limit))
    starts = tuple(p.cpu().numpy() for p in other or (torch.empty(0, 0),) * 2)
    over_rows(lambda a, b: table_rows(*arrays, *ends, tuple(effort), starts, d, m, a, b), len(x))
    return torch.from_numpy(d).to(x.device), torch.from_numpy(m).to(x.device)


def column_weights(importance: Tensor | None, columns: int, width: int, block: int) -> tuple[Tensor, Tensor]:
    """(weight of a column's squared error, reach), float32 [C] each.

    Weights are `block_weights`. Reach is below 1 for columns that count less than their group's average.
    """
    weight = block_weights(importance, columns, block).view(-1, width)
    if importance is None:
        return weight.flatten(), weight.flatten()
    reach = (weight / weight.mean(1, keepdim=True)).clamp_max(1.0).pow(0.25)
    return weight.flatten(), reach.flatten()


def block_weights(importance: Tensor | None, columns: int, block: int) -> Tensor:
    """Importances, float32 [C], plus a millionth of their block's mean, over that mean.

    So columns without any are still rounded sensibly.
    """
    if importance is None:
        return torch.ones(columns)
    blocks = importances(importance, columns).cpu().view(-1, block)
    mean = blocks.mean(1, keepdim=True)
    return torch.where(mean > 0, blocks / torch.where(mean > 0, mean, 1.0) + 1e-6, 1.0).flatten()
