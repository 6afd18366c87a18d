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
from qtool.numerics.codebooks.lanes import address
from qtool.numerics.codebooks.nearest import barring, close_products, neighborhood
from qtool.numerics.codebooks.scale_rule import AGAIN, ScaleRule, VectorEffort
from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.sweep import half
from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def likely_sign(x, weight, a, scale, columns):  # type: ignore[no-untyped-def]
    """The shift that takes up what rounding to -1, 0, 1 leaves of x from x[a] on."""
    left, inverse = np.float32(0.0), np.float32(1.0) / scale
    for j in range(a, a + columns):
        y = x[j] * inverse
        left += weight[j] * (y - min(max(np.rint(y), np.float32(-1.0)), np.float32(1.0)))
    return 1 if left >= 0 else -1


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def group_products(x, weight, a, scale, rule, lookup, signs, guess):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) of a group from x[a] on, for codes chosen at a scale.

    Levels are shifted ones; signs [segments] of the shifts are filled with the better ones, or `guess` with the likely.
    x, weight: addresses; lookup: see `close_products`.
    """
    span, to, segment, delta = lookup[3], address(signs), rule.segment, np.float32(rule.delta)
    xl, ll = np.float32(0.0), np.float32(0.0)
    for i in range(len(signs)):
        best, best_xl, best_ll, best_sign = np.float32(np.inf), np.float32(0.0), np.float32(0.0), 1
        first, last = a + i * segment, a + (i + 1) * segment
        likely = likely_sign(x, weight, first, scale, segment) if guess and delta > 0 and scale > 0 else 0
        for sign in range(1, -2 if delta > 0 else 0, -2):
            if sign + likely == 0:
                continue
            shift = np.float32(sign) * delta
            new_xl, new_ll = np.float32(0.0), np.float32(0.0)
            for at in range(first, last, span):
                more_xl, more_ll = close_products(x, weight, at, scale, shift, lookup)
                new_xl += more_xl
                new_ll += more_ll
            cost = scale * (scale * new_ll - np.float32(2) * new_xl)
            if cost < best:
                best, best_xl, best_ll, best_sign = cost, new_xl, new_ll, sign
        to[i] = np.int8(best_sign)
        xl += best_xl
        ll += best_ll
    return xl, ll


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def sweep(x, weight, a, rule, ratios, lookup, signs, guess):  # type: ignore[no-untyped-def]
    """(scale, its sum of weight level^2) of the best step of a group's sweep, from x[a] on."""
    square, total = np.float32(0.0), np.float32(0.0)
    for j in range(a, a + rule.group):
        square += weight[j] * x[j] * x[j]
        total += weight[j]
    rms = np.sqrt(square / total)
    best, scale, best_ll = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for i in range(len(ratios) + AGAIN if rms > 0 else 0):
        tried = rms * ratios[i] if i < len(ratios) else scale
        xl, ll = group_products(x, weight, a, tried, rule, lookup, signs, guess)
        if xl > 0 and xl * xl > best * ll:
            best, scale, best_ll = xl * xl / ll, xl / ll, ll
    return scale, best_ll


@njit(nogil=True, cache=True, inline="always")
def nearest_step(scale, inverse, top):  # type: ignore[no-untyped-def]
    """The s whose scale is nearest; inverse of d x unit."""
    return min(max(np.rint((scale * inverse - np.float32(1.0)) * np.float32(0.5)), np.float32(0.0)), top)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
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


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def improve_super_block(x, weight, d, rule, effort, lookup, s, signs, other):  # type: ignore[no-untyped-def]
    """Improves d, s [groups] and signs [segments] of a super-block x; returns (d as fp16 has it, cost).

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
                scale = d * np.float32(rule.unit) * (np.float32(2) * tried + np.float32(1))
                xl, ll = group_products(x, weight, g * rule.group, scale, rule, lookup, other, effort.around == 0)
                cost = scale * (scale * ll - np.float32(2) * xl)
                if cost < best:
                    best, best_xl, best_ll, s[g] = cost, xl, ll, tried
                    for i in range(segments):
                        signs[g * segments + i] = other[i]
            total += best
            times = np.float32(2) * s[g] + np.float32(1)
            top += times * best_xl
            bottom += times * times * best_ll
        if turn < effort.rounds and bottom > 0 and top > 0:
            d = top / (bottom * np.float32(rule.unit))
    return d, total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def vector_rows(x, weight, tables, barred, rule, ratios, effort, memory, d, s, signs, errors, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, errors [N, S], s [N, G] and signs [N, segments] for rows start to stop. x [N, C]; weight [C]."""
    blocks = d.shape[1]
    groups, segments = s.shape[1] // blocks, signs.shape[1] // blocks
    columns = groups * rule.group
    scale, ll, tried = np.empty(groups, np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
    tried_signs, other = np.empty(segments, np.int8), np.empty(segments // groups, np.int8)
    promising, guess = np.empty(effort.starts, np.float32), effort.around == 0
    block, weights, to, its = memory[0], memory[1], address(memory[0]), address(memory[1])
    near, values = neighborhood(tables, barred), address(tables.values)
    size, pull = address(memory[2]), address(memory[3])
    lookup = (near, values, tables.lanes, tables.span, tables.signed, tables.even, size, pull)
    for n in range(start, stop):
        for b in range(blocks):
            block[:] = x[n, b * columns : (b + 1) * columns]
            weights[:] = weight[b * columns : (b + 1) * columns]
            for g in range(groups):
                scale[g], ll[g] = sweep(to, its, g * rule.group, rule, ratios, lookup, other, guess)
            propose(scale, ll, rule, effort.multipliers, promising)
            least = np.float32(np.inf)
            for candidate in promising:
                inverse = np.float32(1.0) / (candidate * np.float32(rule.unit)) if candidate > 0 else np.float32(0.0)
                for g in range(groups):
                    tried[g] = nearest_step(scale[g], inverse, np.float32(rule.top))
                found, cost = improve_super_block(to, its, candidate, rule, effort, lookup, tried, tried_signs, other)
                if cost < least:
                    least, d[n, b] = cost, found
                    s[n, b * groups : (b + 1) * groups] = tried
                    signs[n, b * segments : (b + 1) * segments] = tried_signs
            energy = np.float32(0.0)
            for j in range(columns):
                energy += weights[j] * block[j] * block[j]
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
    arrays = (searchable(x), weight.numpy(), book.tables, barring(effort.close), rule, ratios, effort)

    def work(a: int, b: int) -> None:
        vector_rows(*arrays, np.empty((4, block), np.float32), d, s, signs, errors, a, b)

    over_rows(work, rows)
    scale, steps, shifts, error = map(torch.from_numpy, (d, s, signs, errors))
    return scale, steps, shifts, error
