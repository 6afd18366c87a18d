"""GPTQ's walk and the descent after it for formats with a codebook, as compiled kernels: a vector at a time.

Both are those of `walk`, where each column has codes of its own; the codes of a vector are found by `spans`.

Shape letters: N rows, K columns, B columns of a block, V columns of a vector, M magnitudes, L levels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.lanes import LANES, address, load, number, splat, store
from qtool.numerics.codebooks.spans import fill_errors, fill_levels, forest_of, search_span
from qtool.numerics.codebooks.sphere import COST, ENTRY, MINUS, NEVER, searcher
from qtool.numerics.scales.search import FAST
from qtool.numerics.threads.parallel import over_rows

ROWS = 64
"""Rows that descend together: what they share of the Gram matrix, and their pull, stay in the cache."""
GAIN = np.float32(0.9999)
"""Of its cost a span has to keep less than that to move."""


@njit(nogil=True, cache=True, fastmath=FAST)
def take_off(x, steps, rows):  # type: ignore[no-untyped-def]
    """x [C] -= steps [S] times rows [S, C], four rows at a time."""
    for j in range(0, len(steps), 4):
        a, b, c, d = steps[j], steps[j + 1], steps[j + 2], steps[j + 3]
        if a != 0 or b != 0 or c != 0 or d != 0:
            first, second, third, fourth = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            for i in range(len(x)):
                x[i] -= a * first[i] + b * second[i] + c * third[i] + d * fourth[i]


@njit(nogil=True, cache=True)
def write_codes(n, v, forest, best, codes):  # type: ignore[no-untyped-def]
    """Fills codes [S] with what was found in a lane for the vectors from v on."""
    base, width = len(forest.magnitudes), forest.entries.shape[1]
    for i in range(len(codes) // width):
        entry, minus, way = max(np.int64(best[i, ENTRY, n]), 0), np.int64(best[i, MINUS, n]), forest.ways[v + i]
        for j in range(width):
            m = forest.entries[entry, way[j]]
            codes[i * width + j] = m if not forest.signed else base - 1 - m if minus >> j & 1 else base + m


@njit(nogil=True, cache=True, error_model="numpy")
def walk_vector_rows(w, factor, scale, offset, forest, state, codes, error, start, stop):  # type: ignore[no-untyped-def]
    """Walks the B columns of a block for rows start to stop; see `walk.walk_rows`."""
    span, width = len(state.targets), forest.entries.shape[1]
    for a in range(0, w.shape[1], span):
        b, v = a + span, a // width
        here = factor[a:b, a:b]
        for first in range(start, stop, LANES):
            count = min(LANES, stop - first)
            state.targets[:], state.best[0, COST, :count], state.best[0, COST, count:] = 0, NEVER, 0
            for i in range(count):
                n = first + i
                s, o = scale[n, a], offset[n, a]
                inverse = np.float32(1) / s if s != 0 else np.float32(0)
                for j in range(span):
                    state.targets[j, i] = (w[n, a + j] - o) * inverse
            search_span(v, here, True, forest, state)
            for i in range(0, span, width):
                fill_levels(state.best[i // width], forest.ways[v + i // width], forest, state.levels[i : i + width])
            fill_errors(span, state)
            for i in range(count):
                n = first + i
                write_codes(i, v, forest, state.best, codes[n, a:b])
                for j in range(span):
                    error[n, a + j] = state.errors[j, i] * scale[n, a]
                take_off(w[n, b:], error[n, a:b], factor[a:b, b:])


@njit(nogil=True, cache=True, error_model="numpy")
def fill_targets(factor, state):  # type: ignore[no-untyped-def]
    """Fills state.targets with the levels that would be best if they were free, and bounds of what may cost less.

    state.errors [S, LANES] is the pull, in units of the scale; state.levels the present levels.
    """
    span, cost, upper = len(factor), splat(np.float32(0)), address(factor)
    targets, levels, pull = address(state.targets), address(state.levels), address(state.errors)
    for j in range(span):
        store(targets, j, load(levels, j))
    for i in range(span):
        pushed = splat(np.float32(0))
        for j in range(i, span):
            pushed = pushed + load(pull, j) * number(upper, i * span + j)
        cost = cost + pushed * pushed
        for j in range(i, span):
            store(targets, j, load(targets, j) + pushed * number(upper, i * span + j))
    store(address(state.best), COST, cost * splat(GAIN))


@njit(nogil=True, cache=True, error_model="numpy")
def descend_span(rows, a, gram, factor, scale, levels, forest, state, codes, pull, changes):  # type: ignore[no-untyped-def]
    """Moves the codes from column a on of up to LANES rows, and their pull; counts changes [N]."""
    span, width = len(factor), forest.entries.shape[1]
    state.errors[:], state.levels[:] = 0, 0
    for i in range(len(rows)):
        n = rows[i]
        inverse = np.float32(1) / scale[n] if scale[n] != 0 else np.float32(0)
        for j in range(span):
            state.errors[j, i], state.levels[j, i] = pull[n, a + j] * inverse, levels[codes[n, a + j]]
    fill_targets(factor, state)
    search_span(a // width, factor, False, forest, state)
    found, steps = np.empty(span, np.uint8), np.empty(span, np.float32)
    for i in range(len(rows)):
        if state.best[0, ENTRY, i] >= 0:
            n = rows[i]
            write_codes(i, a // width, forest, state.best, found)
            for j in range(span):
                steps[j] = scale[n] * (levels[found[j]] - levels[codes[n, a + j]])
                codes[n, a + j] = found[j]
            take_off(pull[n], steps, gram[a : a + span])
            changes[n] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def descend_vector_rows(gram, factors, scale, levels, forest, state, codes, pull, sweeps, start, stop):  # type: ignore[no-untyped-def]
    """As `walk.descend_rows`, a span at a time: its codes become the best ones given all others.

    factors [K / span, span, span]: of each diagonal block of the Gram matrix, as in the walk.
    """
    span, k = factors.shape[1], codes.shape[1]
    group, changes = k // scale.shape[1], np.empty(len(codes), np.int64)
    for first in range(start, stop, ROWS):
        rows = np.arange(first, min(first + ROWS, stop))
        for _ in range(sweeps):
            changes[rows] = 0
            for a in range(0, k, span):
                for i in range(0, len(rows), LANES):
                    here, its = rows[i : i + LANES], scale[:, a // group]
                    descend_span(here, a, gram, factors[a // span], its, levels, forest, state, codes, pull, changes)
            rows = rows[changes[rows] > 0]


def walk_vector_block(
    w: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, book: Codebook, order: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, errors), [N, B] each, of one block; see `walk.walk`.

    Args:
        w: float32 [N, B], columns in walking order.
        factor: float32 [B, B].
        scale: float32 [N, B].
        offset: float32 [N, B].
        levels: float32 [L].
        book: what codes go together.
        order: int64 [B], natural numbers of the columns: whole spans, whose vectors are whole.
    """
    if w.is_cuda:
        from qtool.numerics.solving import cuda_vectors

        return cuda_vectors.walk_vector_block(w, factor, scale, offset, book, order)
    codes, error = np.empty(w.shape, np.uint8), np.empty(w.shape, np.float32)
    w_, *arrays = [t.contiguous().numpy() for t in (w, factor, scale, offset)]
    w_, forest = w_.copy(), forest_of(book, order.numpy())

    def work(a: int, b: int) -> None:
        walk_vector_rows(w_, *arrays, forest, searcher(book.width, book.span), codes, error, a, b)

    over_rows(work, len(codes))
    return torch.from_numpy(codes), torch.from_numpy(error)


def descend_vectors(
    gram: Tensor,
    params: tuple[Tensor, Tensor],
    levels: Tensor,
    book: Codebook,
    codes: Tensor,
    pull: Tensor,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Improves codes, uint8 [N, K], a span at a time; see `walk.descend`. Returns new codes and their pull.

    Args:
        gram: float32 [K, K], damped.
        params: (scale, offset), float32 [N, G] each.
        levels: float32 [L].
        book: what codes go together.
        codes: uint8 [N, K].
        pull: float32 [N, K].
        sweeps: most passes over a row.
    """
    if codes.is_cuda:
        from qtool.numerics.solving import cuda_vectors

        return cuda_vectors.descend_vectors(gram, params[0], levels, book, codes, pull, sweeps)
    k, span = len(gram), book.span
    order, places = largest_first(gram.diagonal(), book.width)
    gram, codes, pull = gram[order][:, order], codes[:, order], pull[:, order]
    diagonal = gram.view(k // span, span, k // span, span).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    lower = torch.linalg.cholesky(diagonal.flip(1, 2))
    identity = torch.eye(span, device=gram.device).expand_as(lower)
    factors = torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2)
    better, gradient = (t.numpy().copy() for t in (codes, pull))
    arrays = [t.contiguous().numpy() for t in (gram, factors, params[0], levels)]
    forest = forest_of(book, order.numpy())

    def work(a: int, b: int) -> None:
        descend_vector_rows(*arrays, forest, searcher(book.width, book.span), better, gradient, sweeps, a, b)

    over_rows(work, len(better))
    return tuple(torch.from_numpy(t)[:, places] for t in (better, gradient))  # type: ignore[return-value]


def largest_first(diagonal: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(columns, those of each vector by falling size; the place of each), int64 [K].

    Which comes first changes no result of an exact search, but one that settles first what counts most cuts off most.
    """
    inside = diagonal.reshape(-1, width).argsort(dim=1, descending=True, stable=True)
    order = (inside + torch.arange(0, len(diagonal), width)[:, None]).flatten()
    return order, order.argsort()
