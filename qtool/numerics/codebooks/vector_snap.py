"""Rounds to a codebook: the allowed codes of least weighted squared error, exactly, or the best of some close ones.

Shape letters: N rows, C columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.lanes import address
from qtool.numerics.codebooks.nearest import (
    barring,
    close_entry,
    flip_cheapest,
    nearest_span,
    neighborhood,
    sizes,
    workspace,
)
from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.table_search import column_weights
from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True, fastmath=FAST)
def close_codes(x, weight, a, scale, offset, lookup, entries, codes):  # type: ignore[no-untyped-def]
    """Fills codes[a : a + span] with the best of close entries; returns whether one sign still has to flip."""
    near, lanes, span, signed, even, size, pull = lookup
    positive, base, odd = abs(scale) if signed else scale, np.uint8(len(near[1]) + 1), False
    width, there = len(lanes), address(x)
    for at in range(0, span, width):
        odd ^= even & sizes(there, weight, a + at, at, scale, offset, signed, lanes, size, pull)
        entry = close_entry(size, pull, weight, a + at, at, positive, near, lanes, odd and span == width)
        for j in range(a + at, a + at + width):
            m = entries[entry, j - a - at]
            minus = (x[j] - offset) * scale < 0
            codes[j] = m if not signed else np.uint8(base - np.uint8(1) - m) if minus else np.uint8(base + m)
    return odd


@njit(nogil=True, cache=True, fastmath=FAST)
def exact_rows(x, weight, scale, offset, tables, memory, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes [N, C] for rows start to stop. x [N, C]; weight [C]; scale, offset [N, groups]."""
    width, span = x.shape[1] // scale.shape[1], tables.span
    target = np.empty(span, np.float32)
    for n in range(start, stop):
        for a in range(0, x.shape[1], span):
            for j in range(span):
                target[j] = x[n, a + j] - offset[n, a // width]
            part = slice(a, a + span)
            nearest_span(target, weight[part], scale[n, a // width], tables, memory, codes[n, part])


@njit(nogil=True, cache=True, fastmath=FAST)
def close_rows(x, weight, scale, offset, tables, barred, memory, codes, start, stop):  # type: ignore[no-untyped-def]
    """As `exact_rows`, by the best of the entries close by that are not barred."""
    width, size, pull = x.shape[1] // scale.shape[1], memory[0], memory[1]
    near, weights = neighborhood(tables, barred), address(weight)
    lookup = (near, tables.lanes, tables.span, tables.signed, tables.even, address(size), address(pull))
    for n in range(start, stop):
        row, found = x[n], codes[n]
        for g in range(scale.shape[1]):
            s, o = scale[n, g], offset[n, g]
            for a in range(g * width, (g + 1) * width, tables.span):
                if close_codes(row, weights, a, s, o, lookup, tables.entries, found):
                    flip_cheapest(pull, tables, found[a : a + tables.span])


def snap_vectors(
    x: Tensor, importance: Tensor | None, params: tuple[Tensor, Tensor], book: Codebook, count: int
) -> Tensor:
    """The allowed codes of least weighted squared error, uint8 [N, C].

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        params: (scale, offset), float32 [N, groups] each.
        book: what is allowed.
        count: entries near a vector that are compared; 0 for the very nearest of all, which CUDA devices always find.
    """
    weight, _ = column_weights(importance, x.shape[1], book.span, x.shape[1])
    if x.is_cuda:
        from qtool.numerics.solving.cuda_vectors import nearest_codes

        return nearest_codes(x.float(), weight.to(x.device), *params, book)
    codes = np.empty(x.shape, np.uint8)
    arrays = [t.float().contiguous().numpy() for t in (x, weight, *params)]

    def work(a: int, b: int) -> None:
        memory = workspace(book.tables)
        if count:
            close_rows(*arrays, book.tables, barring(count), memory, codes, a, b)
        else:
            exact_rows(*arrays, book.tables, memory, codes, a, b)

    over_rows(work, len(codes))
    return torch.from_numpy(codes)
