"""The nearest allowed codes of a vector in a diagonal metric, as compiled kernels: exactly, or by a table.

By a table: a vector's nearest magnitudes lead to a few entries at little distance from them, of which the best is
taken; this is what ggml's encoders do. Exactly: the costs of both halves of the vector are tabulated over the halves'
own combinations; entries are stored by their first half, and first halves that cannot win are skipped. Where the number
of minus signs must be even but is not, one sign flips: each half has a second table, of costs with the cheapest flip,
so that sign and entry are found together.

Shape letters: V columns of a vector, M magnitudes, H combinations of half a vector; see `codebook`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qtool.numerics.codebooks.codebook import Tables
from qtool.numerics.scales.search import FAST

NEVER = np.float32(1e30)


def workspace(tables: Tables) -> tuple[np.ndarray, np.ndarray, tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Memory of one thread: two numbers per column of a span; costs of columns, quarters and halves of a vector."""
    base, width = len(tables.magnitudes), tables.entries.shape[1]
    shapes = [(width // 2, base)] * 2 + [(2, base**2)] * 2
    halves = np.empty((4, base ** (width // 2)), np.float32)
    size, pull = np.empty((2, tables.span), np.float32)
    return size, pull, (tuple(np.empty(shape, np.float32) for shape in shapes), halves)


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
def sizes(x, weight, a, scale, offset, signed, even, size, pull):  # type: ignore[no-untyped-def]
    """Fills size [span] with what magnitudes are to meet from x[a] on, pull with weight times that.

    Returns whether the number of minus signs is odd where it has to be even.
    """
    odd = False
    for j in range(len(size)):
        d = x[a + j] - offset
        odd ^= d * scale < 0
        size[j] = abs(d) if signed else d
        pull[j] = weight[a + j] * size[j]
    return odd and even


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
def close_entry(size, pull, weight, a, at, scale, middles, close, values, lanes, count, flip):  # type: ignore[no-untyped-def]
    """The best of `count` entries that the nearest magnitudes of the vector at size[at] lead to; one sign may flip."""
    width, base = len(lanes), len(middles) + 1
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    key = 0
    for j in range(width):
        r, m = size[at + j] * inverse, 0
        for i in range(base - 1):
            m += r > middles[i]
        key = key * base + m
    entry = np.int64(close[key, 0])
    if entry >= 0 and not flip:
        return entry
    best, found = np.float32(np.inf), max(entry, -1 - entry)
    for k in range(count):
        entry = found if k == 0 else np.int64(close[key, k])
        cost = np.float32(0.0)
        for j in range(width):
            value = values[entry, j]
            cost += value * (scale * weight[a + at + j] * value - 2 * pull[at + j])
        if flip:
            least = NEVER
            for j in range(width):
                least = min(least, pull[at + j] * values[entry, j])
            cost += 4 * least
        cost *= scale
        if cost < best:
            best, found = cost, entry
    return found


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
def close_products(x, weight, a, scale, shift, middles, close, values, lanes, signed, even, count, size, pull):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) for close codes of x[a : a + span], levels being shifted ones.

    scale >= 0; size, pull [span] are memory.
    """
    width = len(lanes)
    flip = sizes(x, weight, a, scale, scale * shift, signed, even, size, pull)
    xl, ll, least = np.float32(0.0), np.float32(0.0), NEVER
    for at in range(0, len(size), width):
        entry = close_entry(
            size, pull, weight, a, at, scale, middles, close, values, lanes, count, flip and len(size) == width
        )
        if shift != 0:
            for j in range(width):
                value = values[entry, j] + shift
                weighed = weight[a + at + j] * value
                xl += weighed * x[a + at + j]
                ll += weighed * value
            continue
        for j in range(width):
            value = values[entry, j]
            xl += pull[at + j] * value
            ll += weight[a + at + j] * value * value
        if flip:
            for j in range(width):
                least = min(least, pull[at + j] * values[entry, j])
    return (xl - 2 * least if flip else xl), ll


@njit(nogil=True, cache=True, fastmath=FAST)
def sums(left, right, out):  # type: ignore[no-untyped-def]
    """Fills out [I J] with left [I] + right [J], every pair."""
    count = len(right)
    for i in range(len(left)):
        row = out[i * count : (i + 1) * count]
        for j in range(count):
            row[j] = left[i] + right[j]


@njit(nogil=True, cache=True, fastmath=FAST)
def least_sums(left, left_flip, right, right_flip, out):  # type: ignore[no-untyped-def]
    """As `sums`, with a flip on the side where it costs less."""
    count = len(right)
    for i in range(len(left)):
        row = out[i * count : (i + 1) * count]
        for j in range(count):
            row[j] = min(left_flip[i] + right[j], left[i] + right_flip[j])


@njit(nogil=True, cache=True, fastmath=FAST)
def half_costs(x, weight, scale, tables, flips, work, costs, flipped):  # type: ignore[no-untyped-def]
    """Fills costs [H] of the combinations of half a vector; if wanted, `flipped` [H] with one sign against x."""
    columns, column_flips, quarters, quarter_flips = work
    count = len(tables.magnitudes)
    for j in range(len(x)):
        size = abs(x[j]) if tables.signed else x[j]
        for m in range(count):
            value = scale * tables.magnitudes[m]
            columns[j, m] = weight[j] * (size - value) * (size - value)
            column_flips[j, m] = weight[j] * (size + value) * (size + value)
    if len(x) == 2:
        quarters, quarter_flips = columns, column_flips
    else:
        for q in range(2):
            sums(columns[2 * q], columns[2 * q + 1], quarters[q])
            if flips:
                least_sums(
                    columns[2 * q], column_flips[2 * q], columns[2 * q + 1], column_flips[2 * q + 1], quarter_flips[q]
                )
    sums(quarters[0], quarters[1], costs)
    if flips:
        least_sums(quarters[0], quarter_flips[0], quarters[1], quarter_flips[1], flipped)


@njit(nogil=True, cache=True, fastmath=FAST)
def cheapest(costs, others, tables, entry, best):  # type: ignore[no-untyped-def]
    """(entry of least cost, its cost), by the costs [H] of first halves and of others; those given if none is less."""
    least = NEVER
    for k in range(len(others)):
        least = min(least, others[k])
    for k in range(len(costs)):
        if costs[k] + least < best:
            for i in range(tables.first[k], tables.first[k + 1]):
                cost = costs[k] + others[tables.second[i]]
                if cost < best:
                    best, entry = cost, i
    return entry, best


@njit(nogil=True, cache=True, fastmath=FAST)
def write_entry(x, scale, entry, tables, codes):  # type: ignore[no-untyped-def]
    """Fills codes [V] with an entry and the signs of x / scale."""
    base = len(tables.magnitudes)
    for j in range(len(codes)):
        m = tables.entries[entry, j]
        codes[j] = m
        if tables.signed:
            codes[j] = base - 1 - m if x[j] * scale < 0 else base + m


@njit(nogil=True, cache=True, fastmath=FAST)
def flip_cheapest(pull, tables, codes):  # type: ignore[no-untyped-def]
    """Changes the sign among codes where that costs least: 4 scale pull_j magnitude_j."""
    last = 2 * len(tables.magnitudes) - 1
    least, column = NEVER, 0
    for j in range(len(codes)):
        m = max(codes[j], last - codes[j]) - len(tables.magnitudes)
        if pull[j] * tables.magnitudes[m] < least:
            least, column = pull[j] * tables.magnitudes[m], j
    codes[column] = last - codes[column]


@njit(nogil=True, cache=True, fastmath=FAST)
def exact_entry(x, weight, scale, flip, tables, work):  # type: ignore[no-untyped-def]
    """(entry of least weighted squared error for a vector x [V], that error), with one sign flipped or none."""
    parts, halves = work
    half = len(x) // 2
    half_costs(x[:half], weight[:half], scale, tables, flip, parts, halves[0], halves[2])
    half_costs(x[half:], weight[half:], scale, tables, flip, parts, halves[1], halves[3])
    if not flip:
        return cheapest(halves[0], halves[1], tables, 0, NEVER)
    entry, cost = cheapest(halves[2], halves[1], tables, 0, NEVER)
    return cheapest(halves[0], halves[3], tables, entry, cost)


@njit(nogil=True, cache=True, fastmath=FAST)
def nearest_span(x, weight, scale, tables, memory, codes):  # type: ignore[no-untyped-def]
    """Fills codes [span] with the allowed ones of least weighted squared error.

    x, weight [span]; scale of the levels; memory: see `workspace`.
    """
    size, pull, work = memory
    width, span = tables.entries.shape[1], len(x)
    positive = abs(scale) if tables.signed else scale
    odd = sizes(x, weight, 0, scale, np.float32(0.0), tables.signed, tables.even, size, pull)
    alone = odd and span == width
    more, flip_at, flip_entry = NEVER, 0, 0
    for a in range(0, span, width):
        part = slice(a, a + width)
        entry, cost = exact_entry(x[part], weight[part], positive, alone, tables, work)
        if odd and not alone:
            flipped, flipped_cost = exact_entry(x[part], weight[part], positive, True, tables, work)
            if flipped_cost - cost < more:
                more, flip_at, flip_entry = flipped_cost - cost, a, flipped
        write_entry(x[part], scale, entry, tables, codes[part])
    if odd and not alone:
        part = slice(flip_at, flip_at + width)
        write_entry(x[part], scale, flip_entry, tables, codes[part])
        flip_cheapest(pull[part], tables, codes[part])
    elif odd:
        flip_cheapest(pull, tables, codes)
