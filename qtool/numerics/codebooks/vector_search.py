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

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import searchable
from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.nearest import close_products
from qtool.numerics.codebooks.scale_rule import AGAIN, ScaleRule, VectorEffort
from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.sweep import half
from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, fastmath=FAST)
def likely_sign(x, weight, a, scale, columns):  # type: ignore[no-untyped-def]
    """The shift that takes up what rounding to -1, 0, 1 leaves of x from x[a] on."""
    left, inverse = np.float32(0.0), np.float32(1.0) / scale
    for j in range(a, a + columns):
        y = x[j] * inverse
        left += weight[j] * (y - min(max(np.rint(y), np.float32(-1.0)), np.float32(1.0)))
    return 1 if left >= 0 else -1


@njit(nogil=True, cache=True, fastmath=FAST)
def group_products(x, weight, a, scale, rule, count, lookup, signs, guess):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) of a group from x[a] on, for codes chosen at a scale.

    Levels are shifted ones; signs [segments] of the shifts are filled with the better ones, or `guess` with the likely.
    """
    middles, close, values, lanes, signed, even, size, pull = lookup  # once: each access to an array is counted
    xl, ll = np.float32(0.0), np.float32(0.0)
    for i in range(len(signs)):
        best, best_xl, best_ll = np.float32(np.inf), np.float32(0.0), np.float32(0.0)
        first, last = a + i * rule.segment, a + (i + 1) * rule.segment
        likely = likely_sign(x, weight, first, scale, rule.segment) if guess and rule.delta > 0 and scale > 0 else 0
        for sign in range(1, -2 if rule.delta > 0 else 0, -2):
            if sign + likely == 0:
                continue
            shift = np.float32(sign * rule.delta)
            new_xl, new_ll = np.float32(0.0), np.float32(0.0)
            for at in range(first, last, len(size)):
                more_xl, more_ll = close_products(
                    x, weight, at, scale, shift, middles, close, values, lanes, signed, even, count, size, pull
                )
                new_xl += more_xl
                new_ll += more_ll
            cost = scale * (scale * new_ll - 2 * new_xl)
            if cost < best:
                best, best_xl, best_ll, signs[i] = cost, new_xl, new_ll, sign
        xl += best_xl
        ll += best_ll
    return xl, ll


@njit(nogil=True, cache=True, fastmath=FAST)
def sweep(x, weight, a, rule, ratios, count, lookup, signs, guess):  # type: ignore[no-untyped-def]
    """(scale, its sum of weight level^2) of the best step of a group's sweep, from x[a] on."""
    square, total = np.float32(0.0), np.float32(0.0)
    for j in range(a, a + rule.group):
        square += weight[j] * x[j] * x[j]
        total += weight[j]
    rms = np.sqrt(square / total)
    best, scale, best_ll = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for i in range(len(ratios) + AGAIN if rms > 0 else 0):
        tried = rms * ratios[i] if i < len(ratios) else scale
        xl, ll = group_products(x, weight, a, tried, rule, count, lookup, signs, guess)
        if xl > 0 and xl * xl > best * ll:
            best, scale, best_ll = xl * xl / ll, xl / ll, ll
    return scale, best_ll


@njit(nogil=True, cache=True, inline="always")
def nearest_step(scale, inverse, top):  # type: ignore[no-untyped-def]
    """The s whose scale is nearest; inverse of d x unit."""
    return min(max(np.rint((scale * inverse - np.float32(1.0)) * np.float32(0.5)), np.float32(0.0)), top)


@njit(nogil=True, cache=True, fastmath=FAST)
def propose(scale, ll, rule, steps, found):  # type: ignore[no-untyped-def]
    """Fills `found` with the most promising values of d, by the parabolas ll_g (d unit (2 s_g + 1) - scale_g)^2."""
    largest, top = np.float32(0.0), np.float32(rule.top)
    for g in range(len(scale)):
        largest = max(largest, scale[g])
    costs = np.full(len(found), np.inf, np.float32)
    found[:] = 0
    for i in range(steps if largest > 0 else 0):
        end = (2 * top + 1) * (np.float32(0.5) + np.float32(0.6) * np.float32(i) / np.float32(steps - 1))
        unit, inverse, cost = largest / end, end / largest, np.float32(0.0)
        for g in range(len(scale)):
            miss = unit * (2 * nearest_step(scale[g], inverse, top) + 1) - scale[g]
            cost += ll[g] * miss * miss
        worst = 0
        for k in range(len(found)):
            if costs[k] > costs[worst]:
                worst = k
        if cost < costs[worst]:
            costs[worst], found[worst] = cost, unit / np.float32(rule.unit)


@njit(nogil=True, cache=True, fastmath=FAST)
def improve_super_block(x, weight, a, d, rule, effort, lookup, s, signs, other):  # type: ignore[no-untyped-def]
    """Improves d, s [groups] and signs [segments] of a super-block from x[a] on; returns (d as fp16 has it, cost).

    The cost is the error less that of zeros.
    """
    segments = len(signs) // len(s)
    total = np.float32(0.0)
    for turn in range(effort.rounds + 1):
        d = half(d)
        total, top, bottom = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for g in range(len(s)):
            best, best_xl, best_ll, center = np.float32(np.inf), np.float32(0.0), np.float32(0.0), s[g]
            for step in range(-effort.around, effort.around + 1):
                tried = center + np.float32(step)
                if tried < 0 or tried > rule.top:
                    continue
                scale = d * np.float32(rule.unit) * (2 * tried + 1)
                xl, ll = group_products(
                    x, weight, a + g * rule.group, scale, rule, effort.close, lookup, other, effort.around == 0
                )
                cost = scale * (scale * ll - 2 * xl)
                if cost < best:
                    best, best_xl, best_ll, s[g] = cost, xl, ll, tried
                    for i in range(segments):
                        signs[g * segments + i] = other[i]
            total += best
            top += (2 * s[g] + 1) * best_xl
            bottom += (2 * s[g] + 1) ** 2 * best_ll
        if turn < effort.rounds and bottom > 0 and top > 0:
            d = top / (bottom * np.float32(rule.unit))
    return d, total


@njit(nogil=True, cache=True, fastmath=FAST)
def vector_rows(x, weight, tables, rule, ratios, effort, d, s, signs, errors, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, errors [N, S], s [N, G] and signs [N, segments] for rows start to stop. x [N, C]; weight [C]."""
    blocks = d.shape[1]
    groups, segments = s.shape[1] // blocks, signs.shape[1] // blocks
    columns = groups * rule.group
    scale, ll, tried = np.empty(groups, np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
    tried_signs, other = np.empty(segments, np.int8), np.empty(segments // groups, np.int8)
    promising, guess = np.empty(effort.starts, np.float32), effort.around == 0
    size, pull = np.empty(tables.span, np.float32), np.empty(tables.span, np.float32)
    lookup = (tables.middles, tables.close, tables.values, tables.lanes, tables.signed, tables.even, size, pull)
    for n in range(start, stop):
        for b in range(blocks):
            row, a = x[n], b * columns
            for g in range(groups):
                first = a + g * rule.group
                scale[g], ll[g] = sweep(row, weight, first, rule, ratios, effort.close, lookup, other, guess)
            propose(scale, ll, rule, effort.multipliers, promising)
            least = np.float32(np.inf)
            for candidate in promising:
                inverse = np.float32(1.0) / (candidate * np.float32(rule.unit)) if candidate > 0 else np.float32(0.0)
                for g in range(groups):
                    tried[g] = nearest_step(scale[g], inverse, np.float32(rule.top))
                found, cost = improve_super_block(
                    row, weight, a, candidate, rule, effort, lookup, tried, tried_signs, other
                )
                if cost < least:
                    least, d[n, b] = cost, found
                    s[n, b * groups : (b + 1) * groups] = tried
                    signs[n, b * segments : (b + 1) * segments] = tried_signs
            energy = np.float32(0.0)
            for j in range(a, a + columns):
                energy += weight[j] * row[j] * row[j]
            errors[n, b] = 1 + least / energy if energy > 0 else np.float32(0.0)


def vector_scales(
    x: Tensor, weight: Tensor, book: Codebook, block: int, rule: ScaleRule, effort: VectorEffort
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, s, signs of the shifts, errors) of every super-block.

    Args:
        x: float32 [N, C].
        weight: float32 [C] > 0, of a squared error; about 1 on average, so that products do not overflow.
        book: what combinations of levels are allowed.
        block: columns of a super-block.
        rule: how scales are stored.
        effort: how much is tried.

    Returns:
        (float32 [N, S] of values that fp16 holds; float32 [N, G] of integers; int8 [N, C / segment] of 1 and -1; the
        error of the codes that the search has seen, in parts of that of zeros, float32 [N, S]).
    """
    ratios = np.geomspace(rule.low, rule.high, effort.steps).astype(np.float32)
    if x.is_cuda:
        from qtool.numerics.codebooks import batched_search

        return batched_search.vector_scales(x, weight, book, block, rule, ratios, effort)
    rows, columns = x.shape
    d, errors = np.zeros((2, rows, columns // block), np.float32)
    s = np.zeros((rows, columns // rule.group), np.float32)
    signs = np.ones((rows, columns // rule.segment), np.int8)
    arrays = (searchable(x), weight.numpy(), book.tables, rule, ratios, effort)

    def work(a: int, b: int) -> None:
        vector_rows(*arrays, d, s, signs, errors, a, b)

    over_rows(work, rows)
    scale, steps, shifts, error = map(torch.from_numpy, (d, s, signs, errors))
    return scale, steps, shifts, error
