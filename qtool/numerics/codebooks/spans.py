"""The allowed codes of spans that cost least, as `sphere` finds them for a vector; see there.

Vectors that share a parity of signs (two of 4 columns) are taken one after the other, once for either parity of the
first.

Shape letters: V columns of a vector, S columns of a span (V or 2 V), M magnitudes, E entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.lanes import LANES, address, load, number, store
from qtool.numerics.codebooks.sphere import COST, ENTRY, F32, MINUS, entry_tree, nearest_first, search


class Forest(NamedTuple):
    """What a codebook allows in some vectors, as kernels see it.

    Attributes:
        trees: int16 [vectors, nodes, M]; see `entry_tree`.
        ways: int64 [vectors, V], the column of an entry that each column of a vector is.
        entries: uint8 [E, V], magnitudes.
        magnitudes: float32 [M], levels without signs.
        signed: whether there are signs.
        even: whether their number is even in a span.
    """

    trees: np.ndarray
    ways: np.ndarray
    entries: np.ndarray
    magnitudes: np.ndarray
    signed: bool
    even: bool


@njit(nogil=True, cache=True)
def fill_levels(found, way, forest, levels):  # type: ignore[no-untyped-def]
    """Fills levels [V, LANES] with those that were found."""
    magnitudes, entries = forest.magnitudes, forest.entries
    for n in range(LANES):
        entry, minus = max(np.int64(found[ENTRY, n]), 0), np.int64(found[MINUS, n])
        for j in range(len(way)):
            level = magnitudes[entries[entry, way[j]]]
            levels[j, n] = -level if minus >> j & 1 else level


@njit(nogil=True, cache=True, error_model="numpy")
def fill_errors(count, state):  # type: ignore[no-untyped-def]
    """Fills state.errors of the first columns, those that the walk feeds forward, by targets and levels."""
    targets, levels, errors = address(state.targets), address(state.levels), address(state.errors)
    factor, stride = address(state.factor), len(state.factor)
    for j in range(count):
        x = load(targets, j) - load(levels, j)
        for i in range(j):
            x = x - load(errors, i) * number(factor, i * stride + j)
        store(errors, j, x * number(factor, j * stride + j))


@njit(nogil=True, cache=True, error_model="numpy")
def search_vector(v, a, parity, fresh, forest, state, targets, found):  # type: ignore[no-untyped-def]
    """`search` of vector v, in column a of its span, for targets [V, LANES]; fresh: nothing is known of its cost."""
    tree, magnitudes, signed, stride = forest.trees[v], forest.magnitudes, forest.signed, len(state.factor)
    columns, factor = address(state.columns), address(state.factor[a:, a:])
    there, its = address(found), address(targets)
    for j in range(len(targets)):
        store(columns, j, load(its, j))
    if fresh:
        nearest_first(tree, magnitudes, factor, stride, signed, parity, state.columns, columns, there)
    search(tree, magnitudes, factor, stride, signed, parity, state.node, state.place, columns, there)


@njit(nogil=True, cache=True, error_model="numpy")
def search_pair(v, fresh, forest, state):  # type: ignore[no-untyped-def]
    """`search_span` of two vectors that share a parity of signs."""
    best, tried, width = state.best, state.tried, forest.entries.shape[1]
    targets, factor, stride = state.targets, address(state.factor), len(state.factor)
    errors, second, rest = address(state.errors), address(targets[width:]), address(state.levels[width:])
    for parity in (F32(1), F32(-1)):
        tried[:, ENTRY], tried[0, COST] = F32(-1), best[0, COST]
        search_vector(v, 0, parity, fresh, forest, state, targets[:width], tried[0])
        fill_levels(tried[0], forest.ways[v], forest, state.levels[:width])
        fill_errors(width, state)
        for j in range(width):
            x = load(second, j)
            for i in range(width):
                x = x - load(errors, i) * number(factor, i * stride + width + j)
            store(rest, j, x)
        for n in range(LANES):
            tried[1, COST, n] = best[0, COST, n] - tried[0, COST, n] if tried[0, ENTRY, n] >= 0 else F32(0)
        search_vector(v + 1, width, parity, fresh, forest, state, state.levels[width:], tried[1])
        for n in range(LANES):
            if tried[1, ENTRY, n] >= 0:
                best[:, :, n] = tried[:, :, n]
                best[0, COST, n] += tried[1, COST, n]


@njit(nogil=True, cache=True, error_model="numpy")
def search_span(v, factor, fresh, forest, state):  # type: ignore[no-untyped-def]
    """Fills state.best where a span costs less than state.best[0, COST]; its entry is -1 elsewhere.

    v: of its first vector; factor [S, S]; state.targets is its targets; fresh: as in `search_vector`.
    """
    for i in range(len(factor)):
        state.factor[i, i:] = factor[i, i:]
        state.factor[i, i] = F32(1) / factor[i, i]
    state.best[:, ENTRY] = F32(-1)
    if len(factor) > forest.entries.shape[1]:
        search_pair(v, fresh, forest, state)
    else:
        search_vector(v, 0, F32(1) if forest.even else F32(0), fresh, forest, state, state.targets, state.best[0])


def forest_of(book: Codebook, order: np.ndarray) -> Forest:
    """The trees of vectors whose columns are taken in the order given.

    Args:
        book: with E entries.
        order: int64 [columns], whole vectors of natural column numbers, in walking order.
    """
    ways = order.reshape(-1, book.width) % book.width
    known = {way: entry_tree(book.entries[:, way], len(book.magnitudes)) for way in sorted(set(map(tuple, ways)))}
    nodes = max(len(tree) for tree in known.values())
    trees = np.zeros((len(ways), nodes, len(book.magnitudes)), np.int16)
    for there, way in zip(trees, map(tuple, ways), strict=True):
        there[: len(known[way])] = known[way]
    return Forest(trees, ways, book.entries, book.magnitudes, book.signs != "none", book.signs == "even")
