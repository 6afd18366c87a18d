"""The nearest allowed codes of a vector in a diagonal metric, as compiled kernels: exactly, or by a table.

A vector whose nearest magnitudes form an entry is done. Else the costs of both halves of the vector are tabulated over
the halves' own combinations; entries are stored by their first half, and first halves that cannot win are skipped.
Where the number of minus signs must be even but is not, one sign flips: each half has a second table, of costs with
the cheapest flip, so that sign and entry are found together.

Shape letters: V columns of a vector, M magnitudes, H combinations of half a vector; see `codebook`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qtool.numerics.search import FAST

NEVER = np.float32(1e30)


def workspace(magnitudes: int, width: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Memory of one thread for M and V: costs of columns, quarters (with and without a flip) and halves."""
    shapes = [(width // 2, magnitudes)] * 2 + [(2, magnitudes**2)] * 2
    return tuple(np.empty(shape, np.float32) for shape in shapes), np.empty((4, magnitudes ** (width // 2)), np.float32)


@njit(nogil=True, cache=True, fastmath=FAST)
def starting_entry(x, scale, tables):  # type: ignore[no-untyped-def]
    """`Tables.start` of a vector x [V]."""
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    key = 0
    for j in range(len(x)):
        r = x[j] * inverse
        r = abs(r) if tables.signed else r
        m = 0
        for middle in tables.middles:
            m += r > middle
        key = key * len(tables.magnitudes) + m
    return tables.start[key]


@njit(nogil=True, cache=True, fastmath=FAST)
def entry_cost(x, weight, scale, entry, tables):  # type: ignore[no-untyped-def]
    """Weighted squared error of a vector [V] with an entry, signs as in x."""
    total = np.float32(0.0)
    for j in range(len(x)):
        size = abs(x[j]) if tables.signed else x[j]
        d = size - scale * tables.magnitudes[tables.entries[entry, j]]
        total += weight[j] * d * d
    return total


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
    """(entry of least cost, its cost), by the costs [H] of first halves and of the others; those given if none is less."""
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
def write_entry(x, weight, scale, entry, flip, tables, codes):  # type: ignore[no-untyped-def]
    """Fills codes [V] with an entry and the signs of x / scale, one of them flipped where that costs least."""
    base = len(tables.magnitudes)
    least, column = np.float32(np.inf), 0
    for j in range(len(codes)):
        m = tables.entries[entry, j]
        codes[j] = m
        if tables.signed:
            codes[j] = base - 1 - m if x[j] * scale < 0 else base + m
            cost = weight[j] * abs(x[j]) * tables.magnitudes[m]
            if cost < least:
                least, column = cost, j
    if flip:
        codes[column] = 2 * base - 1 - codes[column]


@njit(nogil=True, cache=True, fastmath=FAST)
def odd_signs(x, scale, tables):  # type: ignore[no-untyped-def]
    """Whether the signs of x / scale are not allowed."""
    odd = False
    if tables.even:
        for j in range(len(x)):
            odd ^= x[j] * scale < 0
    return odd


@njit(nogil=True, cache=True, fastmath=FAST)
def near(x, weight, scale, tables, codes):  # type: ignore[no-untyped-def]
    """Fills codes [span] with allowed ones close to x [span], by the table alone; of signs, the cheapest flips."""
    width = tables.entries.shape[1]
    size = abs(scale) if tables.signed else scale
    for a in range(0, len(x), width):
        v, w = x[a : a + width], weight[a : a + width]
        entry = starting_entry(v, size, tables)
        write_entry(v, w, scale, max(entry, -1 - entry), False, tables, codes[a : a + width])
    if odd_signs(x, scale, tables):
        base = len(tables.magnitudes)
        least, column = np.float32(np.inf), 0
        for j in range(len(x)):
            cost = weight[j] * abs(x[j]) * tables.magnitudes[max(codes[j], 2 * base - 1 - codes[j]) - base]
            if cost < least:
                least, column = cost, j
        codes[column] = 2 * base - 1 - codes[column]


@njit(nogil=True, cache=True, fastmath=FAST)
def nearest(x, weight, scale, tables, work, codes):  # type: ignore[no-untyped-def]
    """Fills codes [span] with the allowed ones of least weighted squared error; returns that error.

    x, weight [span]; scale of the levels; work: see `workspace`.
    """
    parts, halves = work
    width, half = tables.entries.shape[1], tables.entries.shape[1] // 2
    size = abs(scale) if tables.signed else scale
    odd = odd_signs(x, scale, tables)
    total, least, flip_at, flip_entry = np.float32(0.0), NEVER, 0, 0
    for a in range(0, len(x), width):
        v, w = x[a : a + width], weight[a : a + width]
        entry = starting_entry(v, size, tables)
        if odd or entry < 0:
            half_costs(v[:half], w[:half], size, tables, odd, parts, halves[0], halves[2])
            half_costs(v[half:], w[half:], size, tables, odd, parts, halves[1], halves[3])
        cost = entry_cost(v, w, size, max(entry, -1 - entry), tables)
        if entry < 0:
            entry, cost = cheapest(halves[0], halves[1], tables, -1 - entry, cost)
        total += cost
        write_entry(v, w, scale, entry, False, tables, codes[a : a + width])
        if odd:
            flipped, flipped_cost = cheapest(halves[2], halves[1], tables, entry, NEVER)
            flipped, flipped_cost = cheapest(halves[0], halves[3], tables, flipped, flipped_cost)
            if flipped_cost - cost < least:
                least, flip_at, flip_entry = flipped_cost - cost, a, flipped
    if odd:
        v, w = x[flip_at : flip_at + width], weight[flip_at : flip_at + width]
        write_entry(v, w, scale, flip_entry, True, tables, codes[flip_at : flip_at + width])
        total += least
    return total
