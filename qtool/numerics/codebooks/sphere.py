"""The allowed codes of a vector that cost least in GPTQ's objective: a sphere decoder over a codebook, compiled.

A vector's weight in the objective, everything left of it being settled and everything right of it free to make up for
its error, is |(w - q) U^-1|^2 = sum_j e_j^2 with the V x V diagonal block U of the walk's inverse factor and the errors
e_j = (w_j - q_j - sum_(i<j) e_i U_ij) / U_jj that the walk feeds forward anyway. The allowed q that minimizes it is
found by depth-first search over the columns: a tree of the codebook's entries says which magnitudes may follow, each
column tries its levels from the nearest outwards, and whatever costs as much as the best so far is cut off (Schnorr and
Euchner's sphere decoder, https://doi.org/10.1007/BF01581144). The search is exact unless it takes more than `LIMIT`
steps, which badly conditioned vectors may.

Vectors that share a parity of signs (two of 4 columns) are taken one after the other, once for either parity of the
first.

Shape letters: V columns of a vector, M magnitudes, L levels.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.scales.search import FAST

LIMIT = 3000
"""Steps of a search, after which the best so far is taken."""


@njit(nogil=True, cache=True)
def entry_tree(entries, magnitudes):  # type: ignore[no-untyped-def]
    """int16 [nodes, M]: the node that a magnitude leads to, -1 where no entry goes; node 0 is the root.

    Nodes stand for the beginnings of entries [E, V]; those of whole entries have no row of their own.
    """
    tree = np.full((entries.shape[0] * entries.shape[1] + 1, magnitudes), -1, np.int16)
    count = 1
    for e in range(entries.shape[0]):
        node = 0
        for j in range(entries.shape[1]):
            m = entries[e, j]
            if tree[node, m] < 0:
                tree[node, m] = count
                count += j + 1 < entries.shape[1]
            node = tree[node, m]
    return tree[:count]


@njit(nogil=True, cache=True, fastmath=FAST, inline="always")
def enter_column(target, factor, offset, inverse, levels, depth, state):  # type: ignore[no-untyped-def]
    """Turns to a column, those left of it being settled: where it would be best, and the levels around that."""
    conditional, _, e, _, _, low, high, _ = state
    value = target[depth]
    for i in range(depth):
        value -= e[i] * factor[i, depth]
    conditional[depth] = (value - offset) * inverse
    k = 0
    while k < len(levels) - 1 and conditional[depth] > (levels[k] + levels[k + 1]) * np.float32(0.5):
        k += 1
    low[depth], high[depth] = k - 1, k


@njit(nogil=True, cache=True, fastmath=FAST)
def search(target, factor, scale, offset, levels, tree, parity, bound, state, codes, errors):  # type: ignore[no-untyped-def]
    """Finds the codes [V] of least cost below `bound`; returns that cost, or `bound` if there are none.

    target [V]; factor [V, V] upper triangular; parity of minus signs: 0, 1, or -1 if free or there are none;
    state: memory of `searcher`; errors [V] are filled along with codes.
    """
    conditional, spent, e, node, minus, low, high, path = state
    last, count = len(codes) - 1, len(levels)
    half = count // 2 if count > tree.shape[1] else 0
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    best, depth, steps = bound, 0, 0
    enter_column(target, factor, offset, inverse, levels, 0, state)
    while depth >= 0:
        x = conditional[depth]
        if high[depth] < count and (low[depth] < 0 or levels[high[depth]] - x <= x - levels[low[depth]]):
            code = high[depth]
            high[depth] += 1
        elif low[depth] >= 0:
            code = low[depth]
            low[depth] -= 1
        else:
            depth -= 1
            continue
        miss = (x - levels[code]) * scale / factor[depth, depth]
        cost = spent[depth] + miss * miss
        steps += 1
        if cost >= best or (steps > LIMIT and best < bound):
            depth -= 1
            continue
        m = code if half == 0 else code - half if code >= half else half - 1 - code
        child, signs = tree[node[depth], m], minus[depth] ^ (code < half)
        if child < 0 or (depth == last and parity >= 0 and signs != parity):
            continue
        path[depth], e[depth] = code, miss
        if depth == last:
            best = cost
            codes[:], errors[:] = path, e
            depth -= 1
            continue
        depth += 1
        spent[depth], node[depth], minus[depth] = cost, child, signs
        enter_column(target, factor, offset, inverse, levels, depth, state)
    return best


@njit(nogil=True, cache=True)
def searcher(width):  # type: ignore[no-untyped-def]
    """Memory of one thread for vectors of that many columns."""
    floats, integers = np.zeros((3, width), np.float32), np.zeros((4, width), np.int64)
    path = np.zeros(width, np.uint8)
    return floats[0], floats[1], floats[2], integers[0], integers[1], integers[2], integers[3], path


@njit(nogil=True, cache=True, fastmath=FAST)
def search_span(target, factor, scale, offset, levels, trees, even, bound, state, memory, codes, errors):  # type: ignore[no-untyped-def]
    """As `search`, for the one or two vectors of a span, which have an even number of minus signs if `even`."""
    width = memory[0].shape[1]
    if len(codes) == width:
        parity = 0 if even else -1
        return search(target, factor, scale, offset, levels, trees[0], parity, bound, state, codes, errors)
    path, e, second = memory
    best = bound
    for parity in range(2):
        head = slice(0, width)
        first = search(
            target[head], factor[head, head], scale, offset, levels, trees[0], parity, best, state, path[0], e[0]
        )
        if first >= best:
            continue
        for j in range(width):
            second[j] = target[width + j]
            for i in range(width):
                second[j] -= e[0, i] * factor[i, width + j]
        tail = factor[width:, width:]
        left = best - first
        more = search(second, tail, scale, offset, levels, trees[1], parity, left, state, path[1], e[1])
        if more < left:
            best = first + more
            codes[:width], codes[width:] = path[0], path[1]
            errors[:width], errors[width:] = e[0], e[1]
    return best


def trees(book: Codebook, order: np.ndarray) -> np.ndarray:
    """int16 [vectors, nodes, M]: the tree of each vector, its columns taken in the order given.

    Args:
        book: with E entries.
        order: int64 [columns], whole vectors of natural column numbers, in walking order.
    """
    inside = [tuple(vector) for vector in order.reshape(-1, book.width) % book.width]
    known = {way: entry_tree(book.entries[:, way], len(book.magnitudes)) for way in sorted(set(inside))}
    nodes = max(len(tree) for tree in known.values())
    padded = {way: np.pad(tree, ((0, nodes - len(tree)), (0, 0))) for way, tree in known.items()}
    return np.stack([padded[way] for way in inside])
