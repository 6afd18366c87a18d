"""GPTQ's walk and the descent after it for formats with a codebook, as compiled kernels: a vector at a time.

Both are those of `walk`, where each column has codes of its own; the codes of a vector are found by `sphere`.

Shape letters: N rows, K columns, B columns of a block, V columns of a vector, M magnitudes, L levels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.sphere import search_span, searcher, trees
from qtool.numerics.scales.search import FAST
from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, fastmath=FAST)
def walk_vector_rows(w, factor, scale, offset, levels, trees, even, span, codes, error, start, stop):  # type: ignore[no-untyped-def]
    """Walks the B columns of a block for rows start to stop; see `walk.walk_rows`. trees [B / V, nodes, M]."""
    columns = w.shape[1]
    width = columns // len(trees)
    state = searcher(width)
    memory = (np.zeros((2, width), np.uint8), np.zeros((2, width), np.float32), np.zeros(width, np.float32))
    for a in range(0, columns, span):
        b = a + span
        here = factor[a:b, a:b]
        tree = trees[a // width : b // width]
        for n in range(start, stop):
            s, o = scale[n, a], offset[n, a]
            search_span(
                w[n, a:b],
                here,
                s,
                o,
                levels,
                tree,
                even,
                np.float32(np.inf),
                state,
                memory,
                codes[n, a:b],
                error[n, a:b],
            )
            row = w[n, b:]
            for j in range(a, b):
                e = error[n, j]
                influence = factor[j, b:]
                for i in range(len(row)):
                    row[i] -= e * influence[i]


@njit(nogil=True, cache=True, fastmath=FAST)
def best_target(factor, pull, scale, offset, levels, codes, pushed, target):  # type: ignore[no-untyped-def]
    """Fills target [span] with the values that would be best if they were free; returns how much they are better."""
    cost = np.float32(0.0)
    for i in range(len(codes)):
        pushed[i] = 0
        for j in range(i, len(codes)):
            pushed[i] += factor[i, j] * pull[j]
        cost += pushed[i] * pushed[i]
    for j in range(len(codes)):
        target[j] = scale * levels[codes[j]] + offset
        for i in range(j + 1):
            target[j] += pushed[i] * factor[i, j]
    return cost


@njit(nogil=True, cache=True, fastmath=FAST)
def take_codes(gram, scale, levels, found, codes, pull):  # type: ignore[no-untyped-def]
    """Changes codes [span] to those found and updates pull [K]; gram [span, K] holds the span's rows."""
    for j in range(len(codes)):
        step = scale * (levels[found[j]] - levels[codes[j]])
        codes[j] = found[j]
        if step != 0:
            row = gram[j]
            for i in range(len(pull)):
                pull[i] -= step * row[i]


@njit(nogil=True, cache=True, fastmath=FAST)
def descend_vector_rows(gram, factors, scale, offset, levels, trees, even, codes, pull, sweeps, start, stop):  # type: ignore[no-untyped-def]
    """As `walk.descend_rows`, a span at a time: its codes become the best ones given all others.

    factors [K / span, span, span]: of each diagonal block of the Gram matrix, as in the walk; trees [K / V, nodes, M].
    """
    span, k = factors.shape[1], codes.shape[1]
    width, group = k // len(trees), k // scale.shape[1]
    state = searcher(width)
    memory = (np.zeros((2, width), np.uint8), np.zeros((2, width), np.float32), np.zeros(width, np.float32))
    pushed, target, errors = (np.zeros(span, np.float32), np.zeros(span, np.float32), np.zeros(span, np.float32))
    found = np.zeros(span, np.uint8)
    for n in range(start, stop):
        for _ in range(sweeps):
            changes = 0
            for a in range(0, k, span):
                factor, s, o = factors[a // span], scale[n, a // group], offset[n, a // group]
                here = codes[n, a : a + span]
                bound = best_target(factor, pull[n, a : a + span], s, o, levels, here, pushed, target)
                bound *= np.float32(0.9999)
                tree = trees[a // width : (a + span) // width]
                if s != 0 and bound > search_span(
                    target, factor, s, o, levels, tree, even, bound, state, memory, found, errors
                ):
                    take_codes(gram[a : a + span], s, levels, found, here, pull[n])
                    changes += 1
            if changes == 0:
                break


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
    w_, *arrays = [t.contiguous().numpy() for t in (w, factor, scale, offset, levels)]
    w_, forest, even = w_.copy(), trees(book, order.numpy()), book.signs == "even"
    over_rows(lambda a, b: walk_vector_rows(w_, *arrays, forest, even, book.span, codes, error, a, b), len(codes))
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
    arrays = [t.contiguous().numpy() for t in (gram, factors, *params, levels)]
    forest, even = trees(book, order.numpy()), book.signs == "even"
    over_rows(lambda a, b: descend_vector_rows(*arrays, forest, even, better, gradient, sweeps, a, b), len(better))
    return tuple(torch.from_numpy(t)[:, places] for t in (better, gradient))  # type: ignore[return-value]


def largest_first(diagonal: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(columns, those of each vector by falling size; the place of each), int64 [K].

    Which comes first changes no result of an exact search, but one that settles first what counts most cuts off most.
    """
    inside = diagonal.reshape(-1, width).argsort(dim=1, descending=True, stable=True)
    order = (inside + torch.arange(0, len(diagonal), width)[:, None]).flatten()
    return order, order.argsort()
