"""The allowed codes of vectors that cost least in GPTQ's objective: a sphere decoder over a codebook, compiled.

A vector's weight in the objective, everything left of it being settled and everything right of it free to make up for
its error, is |(w - q) U^-1|^2 = sum_j e_j^2 with the V x V diagonal block U of the walk's inverse factor and the errors
e_j = (w_j - q_j - sum_(i<j) e_i U_ij) / U_jj that the walk feeds forward anyway. The allowed q that minimizes it is
found by depth-first search over the columns: a tree of the codebook's entries says which magnitudes may follow, each
with the sign that is nearer and then with the other one, and whatever costs as much as the best so far is cut off
(after Schnorr and Euchner's sphere decoder, https://doi.org/10.1007/BF01581144). The search is exact unless it takes
more than `LIMIT` steps, which badly conditioned vectors may.

The same columns of several rows are searched together, each row in a lane (see `lanes`): they have U and the tree in
common, and go where one of them has to. What a row finds does not depend on the others.

Everything is in units of a row's scale, w being levels (w - offset) / scale.

Shape letters: V columns of a vector, S columns of a span (V or 2 V), M magnitudes, L levels, E entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from qtool.numerics.codebooks.lanes import LANES, address, any_less, load, number, splat, store, where_less

F32 = np.float32
LIMIT = F32(100000)
"""Steps of a search, after which the best so far is taken."""
NEVER = F32(1e30)
"""More than anything costs."""
COST, ENTRY, MINUS = 0, 1, 2
"""Rows of what was found: its cost, the number of its entry (-1: nothing), and as bits which signs are minus."""


SIZE, SIDE, SPENT, SIGN, MINUSES, FRAME = range(8, 14)
"""Rows of a column: what its magnitude is to meet, and the sign that comes first; of the columns before it their cost,
the product of their signs, and as bits which are minus; and how many rows it has."""


@njit(nogil=True, cache=True)
def entry_tree(entries, magnitudes):  # type: ignore[no-untyped-def]
    """int16 [nodes, M]: the node that a magnitude leads to, -1 where no entry goes; node 0 is the root.

    Nodes stand for the beginnings of entries [E, V]; the last column leads to the number of an entry.
    """
    tree = np.full((entries.shape[0] * entries.shape[1] + 1, magnitudes), -1, np.int16)
    count, last = 1, entries.shape[1] - 1
    for e in range(entries.shape[0]):
        node = 0
        for j in range(last):
            m = entries[e, j]
            if tree[node, m] < 0:
                tree[node, m] = count
                count += 1
            node = tree[node, m]
        tree[node, entries[e, last]] = e
    return tree[:count]


class Searcher(NamedTuple):
    """Memory of one thread.

    Attributes:
        columns: float32 [V * FRAME, LANES]: of every column what is left of the targets [V] when those before it are
            settled, and then as `SIZE` and so on say.
        node, place: int64 [V], where the search is.
        factor: float32 [S, S], with the inverse of its diagonal.
        targets, levels, errors: float32 [S, LANES].
        best, tried: float32 [2, 3, LANES], what was found for each vector of a span; its cost is that of the first.
    """

    columns: np.ndarray
    node: np.ndarray
    place: np.ndarray
    factor: np.ndarray
    targets: np.ndarray
    levels: np.ndarray
    errors: np.ndarray
    best: np.ndarray
    tried: np.ndarray


def searcher(width: int, span: int) -> Searcher:
    """For vectors and spans of that many columns."""
    node, place = np.zeros((2, width), np.int64)
    targets, levels, errors = np.zeros((3, span, LANES), F32)
    best, tried = np.zeros((2, 2, 3, LANES), F32)
    columns, factor = np.zeros((width * FRAME, LANES), F32), np.zeros((span, span), F32)
    return Searcher(columns, node, place, factor, targets, levels, errors, best, tried)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def enter(columns, depth, width, signed, parity):  # type: ignore[no-untyped-def]
    """Turns to a column, those left of it being settled: which sign comes first, and what its magnitude is to meet."""
    here = depth * FRAME
    x, first = load(columns, here + depth), splat(F32(1))
    if signed and depth == width - 1 and parity != 0:
        first = load(columns, here + SIGN) * splat(parity)
    elif signed:
        first = where_less(x, splat(F32(0)), splat(F32(-1)), first)
    store(columns, here + SIDE, first)
    store(columns, here + SIZE, x * first)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def leave(columns, depth, width, factor, stride, error, sign, cost, minus):  # type: ignore[no-untyped-def]
    """Settles a column; the next one is to be entered."""
    here = depth * FRAME
    store(columns, here + FRAME + SPENT, cost)
    store(columns, here + FRAME + MINUSES, minus)
    store(columns, here + FRAME + SIGN, load(columns, here + SIGN) * sign)
    for j in range(depth + 1, width):
        rest = load(columns, here + j) - error * number(factor, depth * stride + j)
        store(columns, here + FRAME + j, rest)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def begin(columns, width, signed, parity):  # type: ignore[no-untyped-def]
    """Turns to the first column."""
    store(columns, SPENT, splat(F32(0)))
    store(columns, MINUSES, splat(F32(0)))
    store(columns, SIGN, splat(F32(1)))
    enter(columns, 0, width, signed, parity)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def keep(found, cost, entry, minus):  # type: ignore[no-untyped-def]
    """Keeps what costs less than what was found; the bound that follows."""
    bound = load(found, COST)
    store(found, ENTRY, where_less(cost, bound, entry, load(found, ENTRY)))
    store(found, MINUS, where_less(cost, bound, minus, load(found, MINUS)))
    store(found, COST, where_less(cost, bound, cost, bound))


@njit(nogil=True, cache=True, error_model="numpy")
def nearest_first(tree, magnitudes, factor, stride, signed, parity, memory, columns, found):  # type: ignore[no-untyped-def]
    """As `search`, which begins with it where nothing is known: each column takes what is nearest of what may follow.

    memory [V * FRAME, LANES] is what columns points to.
    """
    width, zero = len(memory) // FRAME, splat(F32(0))
    nodes, level = np.zeros(LANES, np.int64), np.empty(LANES, np.float32)
    begin(columns, width, signed, parity)
    for depth in range(width):
        here = depth * FRAME
        for n in range(LANES):
            nearest, taken = F32(np.inf), 0
            for m in range(len(magnitudes)):
                away = abs(memory[here + SIZE, n] - magnitudes[m])
                if away < nearest and tree[nodes[n], m] >= 0:
                    nearest, taken = away, m
            nodes[n], level[n] = tree[nodes[n], taken], magnitudes[taken]
        first = load(columns, here + SIDE)
        miss = (load(columns, here + SIZE) - load(address(level), 0)) * number(factor, depth * stride + depth)
        cost = load(columns, here + SPENT) + miss * miss
        minus = load(columns, here + MINUSES) + where_less(first, zero, splat(F32(1 << depth)), zero)
        if depth + 1 < width:
            leave(columns, depth, width, factor, stride, miss * first, first, cost, minus)
            enter(columns, depth + 1, width, signed, parity)
            continue
        for n in range(LANES):
            level[n] = nodes[n]
        keep(found, cost, load(address(level), 0), minus)


@njit(nogil=True, cache=True, error_model="numpy")
def search(tree, magnitudes, factor, stride, signed, parity, node, place, columns, found):  # type: ignore[no-untyped-def]
    """Fills found [3, LANES] with the entries and signs of least cost, where that is less than found[COST].

    tree [nodes, M]; factor [V, V], a row each `stride`, with the inverse of its diagonal; parity of minus signs: 1
    even, -1 odd, 0 if free or there are none; the first rows of columns are the targets. factor, columns and found
    are addresses.
    """
    zero, one, limit = splat(F32(0)), splat(F32(1)), splat(LIMIT)
    width, depth, steps, bound = len(node), 0, zero, load(found, COST)
    begin(columns, width, signed, parity)
    node[0], place[0] = 0, 0
    while depth >= 0:
        m = place[depth]  # twice a magnitude, and one more for the sign that is not nearer
        if m >= 2 * len(magnitudes):
            depth -= 1
            continue
        place[depth] = m + 2 - (m & 1)
        child = tree[node[depth], m >> 1]
        if child < 0:
            continue
        here, level = depth * FRAME, magnitudes[m >> 1]
        first, size = load(columns, here + SIDE), load(columns, here + SIZE)
        miss = (size - splat(-level if m & 1 else level)) * number(factor, depth * stride + depth)
        cost = load(columns, here + SPENT) + miss * miss
        if not any_less(cost, bound):
            continue
        sign = zero - first if m & 1 else first
        minus = load(columns, here + MINUSES) + where_less(sign, zero, splat(F32(1 << depth)), zero)
        if depth == width - 1:
            keep(found, where_less(cost, bound, cost, splat(NEVER)), splat(F32(child)), minus)
            bound = where_less(cost, bound, cost, bound)
            continue
        if signed and not m & 1:
            place[depth] = m + 1
        steps = steps + where_less(cost, bound, one, zero)
        bound = where_less(limit, steps, zero, bound)
        leave(columns, depth, width, factor, stride, miss * first, sign, cost, minus)
        depth += 1
        node[depth], place[depth] = child, 0
        enter(columns, depth, width, signed, parity)
