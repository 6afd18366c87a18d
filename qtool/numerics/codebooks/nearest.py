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

from qtool.numerics.codebooks.codebook import NEIGHBORS, Tables
from qtool.numerics.codebooks.lanes import address, least_lane, load, load_small, splat, where_less
from qtool.numerics.scales.search import FAST

NEVER = np.float32(1e30)


def workspace(tables: Tables) -> tuple[np.ndarray, np.ndarray, tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Memory of one thread: two numbers per column of a span; costs of columns, quarters and halves of a vector."""
    base, width = len(tables.magnitudes), tables.entries.shape[1]
    shapes = [(width // 2, base)] * 2 + [(2, base**2)] * 2
    halves = np.empty((4, base ** (width // 2)), np.float32)
    size, pull = np.empty((2, tables.span), np.float32)
    return size, pull, (tuple(np.empty(shape, np.float32) for shape in shapes), halves)


def barring(count: int) -> np.ndarray:
    """float32 [NEIGHBORS], what it costs to take each neighbor: nothing for the first `count`."""
    return np.where(np.arange(NEIGHBORS) < count, np.float32(0), NEVER)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy", forceinline=True)
def sizes(x, weight, a, at, scale, offset, signed, lanes, size, pull):  # type: ignore[no-untyped-def]
    """Fills size [V] from `at` on with what magnitudes are to meet from x[a] on, pull with weight times that.

    Returns whether the number of minus signs is odd. Arrays are addresses.
    """
    odd = False
    for j in range(len(lanes)):
        d = x[a + j] - offset
        odd ^= d * scale < 0
        size[at + j] = abs(d) if signed else d
        pull[at + j] = weight[a + j] * size[at + j]
    return odd


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy", forceinline=True)
def close_entry(size, pull, weight, a, at, scale, near, lanes, flip):  # type: ignore[no-untyped-def]
    """The best of the entries that the nearest magnitudes of the vector at size[at] lead to; one sign may flip.

    Its weights begin at weight[a]; near: see `neighborhood`. Each of the entries is in a lane.
    """
    middles, steps, close, levels, barred = near
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    key = np.int64(0)
    for j in range(len(lanes)):
        r, m = size[at + j] * inverse, np.int64(0)
        for i in range(len(steps)):
            m += r > middles[i]
        key = key * (len(steps) + 1) + m
    entry = np.int64(close[key * NEIGHBORS])
    if entry >= 0 and not flip:
        return entry
    cost, least = load(barred, 0), splat(NEVER)
    for j in range(len(lanes)):
        level, push = load_small(levels, key * len(lanes) + j), scale * pull[at + j]
        cost = cost + level * (level * splat(scale * scale * weight[a + j]) - splat(np.float32(2) * push))
        if flip:
            change = level * splat(push)
            least = where_less(change, least, change, least)
    if flip:
        cost = cost + splat(np.float32(4)) * least
    entry = np.int64(close[key * NEIGHBORS + least_lane(cost)])
    return max(entry, -1 - entry)


@njit(nogil=True, cache=True, inline="always")
def neighborhood(tables, barred):  # type: ignore[no-untyped-def]
    """What finds close entries, as addresses: see `Tables` and `barring`."""
    return address(tables.middles), tables.steps, address(tables.close), address(tables.levels), address(barred)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy", forceinline=True)
def close_products(x, weight, a, scale, shift, lookup):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) for close codes of x[a : a + span], levels being shifted ones.

    scale >= 0; x, weight and the arrays of lookup are addresses, the last two of memory for span numbers.
    """
    near, values, lanes, span, signed, even, size, pull = lookup
    xl, ll, least, odd = np.float32(0.0), np.float32(0.0), NEVER, False
    for at in range(0, span, len(lanes)):
        first = a + at
        odd ^= even & sizes(x, weight, first, at, scale, scale * shift, signed, lanes, size, pull)
        entry = close_entry(size, pull, weight, first, at, scale, near, lanes, odd and span == len(lanes))
        if shift != 0:
            for j in range(len(lanes)):
                value = values[entry * len(lanes) + j] + shift
                weighed = weight[first + j] * value
                xl += weighed * x[first + j]
                ll += weighed * value
            continue
        for j in range(len(lanes)):
            value = values[entry * len(lanes) + j]
            push = pull[at + j] * value
            xl += push
            ll += weight[first + j] * value * value
            least = min(least, push)
    return (xl - np.float32(2) * least if odd else xl), ll


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
    numbers, weights, to, pulls = address(x), address(weight), address(size), address(pull)
    odd = False
    for a in range(0, span, width):
        odd ^= tables.even & sizes(
            numbers, weights, a, a, scale, np.float32(0.0), tables.signed, tables.lanes, to, pulls
        )
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
