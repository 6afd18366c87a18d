"""Scales for codebooks in super-blocks: w_hat = d * unit * (2 s + 1) * (level + shift).

A super-block has one d; each of its groups has an integer s in [0, top]; each segment of columns has a shift, one of
+delta and -delta, where a format has them. The search minimizes the (importance-weighted) squared error:

- a group's own best scale comes from a sweep around its root mean square; each step chooses codes and closes with
  weighted least squares, as in ggml (quantize_row_iq2_xs_impl and its like in ggml-quants.c,
  https://github.com/ggml-org/llama.cpp);
- d is chosen among many by the parabolas that the groups' errors are near their optimum, which takes the rounding of
  all s into account (ggml divides the largest scale by 2 top + 1);
- the most promising d are followed up: s, shifts and codes, then d by least squares for them, in turns.

Shape letters: N rows, C columns, S super-blocks of a row, G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.codebook import Codebook
from qtool.numerics.nearest import near, nearest, workspace
from qtool.numerics.parallel import over_rows
from qtool.numerics.search import FAST
from qtool.numerics.table_search import column_weights, half


class Rule(NamedTuple):
    """How scales are stored.

    Attributes:
        group: columns that share s.
        unit: of a scale, in d.
        top: largest s.
        delta: size of shifts; 0 if there are none.
        segment: columns that share a shift; divides `group`.
        low, high: where a group's sweep begins and ends, relative to its root mean square.
    """

    group: int
    unit: float
    top: int
    delta: float
    segment: int
    low: float
    high: float


class Effort(NamedTuple):
    """How much is tried.

    Attributes:
        steps: of a group's sweep.
        multipliers: steps of the sweep over d.
        starts: values of d that are followed up.
        rounds: turns of (s, shifts, codes) and d for each of them.
        around: values of s tried on both sides of the rounded one.
        exact: whether codes are the nearest allowed ones, not just close.
    """

    steps: int
    multipliers: int
    starts: int
    rounds: int
    around: int
    exact: bool


EFFORT = {
    "fast": Effort(6, 32, 1, 1, 0, False),
    "default": Effort(12, 64, 2, 2, 1, True),
    "thorough": Effort(32, 256, 4, 3, 2, True),
}


@njit(nogil=True, cache=True, fastmath=FAST)
def unit_products(x, weight, scale, shift, levels, tables, exact, work, target, codes):  # type: ignore[no-untyped-def]
    """(sum of weight x (level + shift), sum of weight (level + shift)^2) for codes chosen at a scale; x [span]."""
    for j in range(len(x)):
        target[j] = x[j] - scale * shift
    if exact:
        nearest(target, weight, scale, tables, work, codes)
    else:
        near(target, weight, scale, tables, codes)
    xl, ll = np.float32(0.0), np.float32(0.0)
    for j in range(len(x)):
        level = levels[codes[j]] + shift
        xl += weight[j] * x[j] * level
        ll += weight[j] * level * level
    return xl, ll


@njit(nogil=True, cache=True, fastmath=FAST)
def group_products(x, weight, scale, rule, levels, tables, exact, memory, signs):  # type: ignore[no-untyped-def]
    """The same for a group, whose shifts (signs [segments]) are chosen as well."""
    work, target, codes = memory
    span = len(codes)
    xl, ll = np.float32(0.0), np.float32(0.0)
    for i in range(len(signs)):
        best, best_xl, best_ll = np.float32(np.inf), np.float32(0.0), np.float32(0.0)
        for sign in range(1, -2 if rule.delta > 0 else 0, -2):
            shift = np.float32(sign * rule.delta)
            new_xl, new_ll = np.float32(0.0), np.float32(0.0)
            for a in range(i * rule.segment, (i + 1) * rule.segment, span):
                v, w = x[a : a + span], weight[a : a + span]
                more_xl, more_ll = unit_products(v, w, scale, shift, levels, tables, exact, work, target, codes)
                new_xl += more_xl
                new_ll += more_ll
            cost = scale * (scale * new_ll - 2 * new_xl)
            if cost < best:
                best, best_xl, best_ll, signs[i] = cost, new_xl, new_ll, sign
        xl += best_xl
        ll += best_ll
    return xl, ll


@njit(nogil=True, cache=True, fastmath=FAST)
def sweep(x, weight, rule, steps, levels, tables, exact, memory, signs):  # type: ignore[no-untyped-def]
    """(scale, its sum of weight level^2) of the best step of a group's sweep."""
    square, total = np.float32(0.0), np.float32(0.0)
    for j in range(len(x)):
        square += weight[j] * x[j] * x[j]
        total += weight[j]
    size = np.sqrt(square / total)
    best, scale, best_ll = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for i in range(steps if size > 0 else 0):
        tried = np.float32(size * rule.low * (rule.high / rule.low) ** (i / max(steps - 1, 1)))
        xl, ll = group_products(x, weight, tried, rule, levels, tables, exact, memory, signs)
        if xl > 0 and xl * xl > best * ll:
            best, scale, best_ll = xl * xl / ll, xl / ll, ll
    return scale, best_ll


@njit(nogil=True, cache=True, inline="always")
def nearest_step(scale, d, rule):  # type: ignore[no-untyped-def]
    """The s whose scale is nearest."""
    x = np.rint((scale / (d * np.float32(rule.unit)) - np.float32(1.0)) * np.float32(0.5)) if d > 0 else np.float32(0.0)
    return min(max(x, np.float32(0.0)), np.float32(rule.top))


@njit(nogil=True, cache=True, fastmath=FAST)
def propose(scale, ll, rule, steps, found):  # type: ignore[no-untyped-def]
    """Fills `found` with the most promising values of d, by the parabolas ll_g (d unit (2 s_g + 1) - scale_g)^2."""
    largest = np.float32(0.0)
    for g in range(len(scale)):
        largest = max(largest, scale[g])
    costs = np.full(len(found), np.inf, np.float32)
    found[:] = 0
    for i in range(steps):
        end = (2 * rule.top + 1) * (np.float32(0.5) + np.float32(0.6) * np.float32(i) / np.float32(steps - 1))
        d = largest / (np.float32(rule.unit) * end)
        cost = np.float32(0.0)
        for g in range(len(scale)):
            miss = d * np.float32(rule.unit) * (2 * nearest_step(scale[g], d, rule) + 1) - scale[g]
            cost += ll[g] * miss * miss
        worst = 0
        for k in range(len(found)):
            if costs[k] > costs[worst]:
                worst = k
        if cost < costs[worst]:
            costs[worst], found[worst] = cost, d


@njit(nogil=True, cache=True, fastmath=FAST)
def settle(x, weight, d, rule, effort, levels, tables, memory, s, signs, other):  # type: ignore[no-untyped-def]
    """Improves d, s [groups] and signs [segments] of a super-block in turns; returns (d as fp16 has it, cost).

    The cost is the error less that of zeros.
    """
    segments = len(signs) // len(s)
    total = np.float32(0.0)
    for turn in range(effort.rounds + 1):
        d = half(d)
        total, top, bottom = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for g in range(len(s)):
            v, w = x[g * rule.group : (g + 1) * rule.group], weight[g * rule.group : (g + 1) * rule.group]
            best, best_xl, best_ll, center = np.float32(np.inf), np.float32(0.0), np.float32(0.0), s[g]
            for step in range(-effort.around, effort.around + 1):
                tried = center + np.float32(step)
                if tried < 0 or tried > rule.top:
                    continue
                scale = d * np.float32(rule.unit) * (2 * tried + 1)
                xl, ll = group_products(v, w, scale, rule, levels, tables, effort.exact, memory, other)
                cost = scale * (scale * ll - 2 * xl)
                if cost < best:
                    best, best_xl, best_ll, s[g] = cost, xl, ll, tried
                    signs[g * segments : (g + 1) * segments] = other
            total += best
            top += (2 * s[g] + 1) * best_xl
            bottom += (2 * s[g] + 1) ** 2 * best_ll
        if turn < effort.rounds and bottom > 0 and top > 0:
            d = top / (bottom * np.float32(rule.unit))
    return d, total


@njit(nogil=True, cache=True, fastmath=FAST)
def vector_rows(x, weight, levels, tables, rule, effort, work, d, s, signs, start, stop):  # type: ignore[no-untyped-def]
    """Fills d [N, S], s [N, G] and signs [N, segments] for rows start to stop. x [N, C]; weight [C]."""
    blocks = d.shape[1]
    groups, segments = s.shape[1] // blocks, signs.shape[1] // blocks
    columns = groups * rule.group
    scale, ll, tried = np.empty(groups, np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
    tried_signs, other = np.empty(segments, np.int8), np.empty(segments // groups, np.int8)
    promising = np.empty(effort.starts, np.float32)
    memory = (work, np.empty(tables.span, np.float32), np.empty(tables.span, np.uint8))
    for n in range(start, stop):
        for b in range(blocks):
            v, w = x[n, b * columns : (b + 1) * columns], weight[b * columns : (b + 1) * columns]
            for g in range(groups):
                part = slice(g * rule.group, (g + 1) * rule.group)
                scale[g], ll[g] = sweep(
                    v[part], w[part], rule, effort.steps, levels, tables, effort.exact, memory, other
                )
            propose(scale, ll, rule, effort.multipliers, promising)
            least = np.float32(np.inf)
            for candidate in promising:
                for g in range(groups):
                    tried[g] = nearest_step(scale[g], candidate, rule)
                found, cost = settle(v, w, candidate, rule, effort, levels, tables, memory, tried, tried_signs, other)
                if cost < least:
                    least, d[n, b] = cost, found
                    s[n, b * groups : (b + 1) * groups] = tried
                    signs[n, b * segments : (b + 1) * segments] = tried_signs


def vector_scales(
    x: Tensor, importance: Tensor | None, levels: Tensor, book: Codebook, block: int, rule: Rule, effort: Effort
) -> tuple[Tensor, Tensor, Tensor]:
    """(d, s, signs of the shifts) of every super-block.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        levels: float32 [L].
        book: what combinations of them are allowed.
        block: columns of a super-block.
        rule: how scales are stored.
        effort: how much is tried.

    Returns:
        (float32 [N, S] of values that fp16 holds, float32 [N, G] of integers, int8 [N, C / segment] of 1 and -1).
    """
    weight, _ = column_weights(importance, x.shape[1], rule.group, block)
    rows, columns = x.shape
    d, s = np.zeros((rows, columns // block), np.float32), np.zeros((rows, columns // rule.group), np.float32)
    signs = np.ones((rows, columns // rule.segment), np.int8)
    arrays = (x.float().contiguous().cpu().numpy(), weight.numpy(), levels.numpy(), book.tables, rule, effort)

    def work(a: int, b: int) -> None:
        vector_rows(*arrays, workspace(len(book.magnitudes), book.width), d, s, signs, a, b)

    over_rows(work, rows)
    return torch.from_numpy(d).to(x.device), torch.from_numpy(s).to(x.device), torch.from_numpy(signs).to(x.device)


@njit(nogil=True, cache=True, fastmath=FAST)
def snap_rows(x, weight, scale, offset, tables, work, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes [N, C] for rows start to stop. x [N, C]; weight [C]; scale, offset [N, groups]."""
    width, span = x.shape[1] // scale.shape[1], tables.span
    target = np.empty(span, np.float32)
    for n in range(start, stop):
        for a in range(0, x.shape[1], span):
            for j in range(span):
                target[j] = x[n, a + j] - offset[n, a // width]
            nearest(target, weight[a : a + span], scale[n, a // width], tables, work, codes[n, a : a + span])


def snap_vectors(x: Tensor, importance: Tensor | None, scale: Tensor, offset: Tensor, book: Codebook) -> Tensor:
    """The allowed codes of least weighted squared error, uint8 [N, C].

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        scale: float32 [N, groups].
        offset: float32 [N, groups].
        book: what is allowed.
    """
    weight, _ = column_weights(importance, x.shape[1], book.span, x.shape[1])
    codes = np.empty(x.shape, np.uint8)
    arrays = [t.float().contiguous().cpu().numpy() for t in (x, weight, scale, offset)]

    def work(a: int, b: int) -> None:
        snap_rows(*arrays, book.tables, workspace(len(book.magnitudes), book.width), codes, a, b)

    over_rows(work, len(codes))
    return torch.from_numpy(codes).to(x.device)
