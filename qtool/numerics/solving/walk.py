"""The column walk of GPTQ and the coordinate descent after it, as compiled kernels over rows.

Both minimize tr(D H D^T), D = W - W_hat, one row at a time, for a grid `w_hat = scale * level + offset` whose
(scale, offset) are fixed per row and group of columns. Rows are independent, so every thread takes some.

Shape letters: N rows, K columns, B columns of a block, G groups, L levels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.scales.search import FAST
from qtool.numerics.solving.vector_walk import walk_vector_block
from qtool.numerics.threads.parallel import over_rows

BLOCK = 128
"""Columns whose errors are fed forward inside the kernel; what lies to the right is updated once per block."""

LANES = 256
"""Rows that are walked together: their part of a block stays in the cache."""


@njit(nogil=True, cache=True, inline="always")
def nearest(x, levels, lowest, uniform):  # type: ignore[no-untyped-def]
    """Index of the level nearest to x; consecutive integers are rounded, other tables bisected."""
    last = len(levels) - 1
    if uniform:
        return int(min(max(np.rint(x), lowest), lowest + last) - lowest)
    below, above = 0, last
    while below < above:
        middle = (below + above) // 2
        if x > (levels[middle] + levels[middle + 1]) * np.float32(0.5):
            below = middle + 1
        else:
            above = middle
    return below


@njit(nogil=True, cache=True, fastmath=FAST)
def walk_rows(w, factor, scale, offset, levels, uniform, codes, error, start, stop):  # type: ignore[no-untyped-def]
    """Walks the B columns of a block for rows start to stop.

    Columns lie in memory one after the other, because they wait for each other while rows go side by side: w [B, N] is
    overwritten; factor [B, B] is the block of the inverse factor U; scale, offset [B, N]; codes uint8 [B, N] and error
    [B, N] are filled, error being D_j / U_jj.
    """
    lowest, highest = levels[0], levels[0] + np.float32(len(levels) - 1)
    for first in range(start, stop, LANES):
        rows = slice(first, min(first + LANES, stop))
        for j in range(len(w)):
            x, s, o, e, code = w[j, rows], scale[j, rows], offset[j, rows], error[j, rows], codes[j, rows]
            diagonal = factor[j, j]
            if uniform:
                for n in range(len(x)):
                    level = min(max(np.rint((x[n] - o[n]) / s[n]), lowest), highest) if s[n] != 0 else lowest
                    code[n] = np.uint8(level - lowest)
                    e[n] = (x[n] - (s[n] * level + o[n])) / diagonal
            else:
                for n in range(len(x)):
                    c = nearest((x[n] - o[n]) / s[n], levels, lowest, uniform) if s[n] != 0 else 0
                    code[n] = c
                    e[n] = (x[n] - (s[n] * levels[c] + o[n])) / diagonal
            for i in range(j + 1, len(w)):
                u, later = factor[j, i], w[i, rows]
                for n in range(len(x)):
                    later[n] -= e[n] * u


@njit(nogil=True, cache=True, fastmath=FAST)
def descend_rows(gram, scale, levels, uniform, codes, pull, sweeps, start, stop):  # type: ignore[no-untyped-def]
    """Coordinate descent on the codes of rows start to stop: each in turn moves to the best level given all others.

    gram [K, K]; scale [N, G], for K / G columns each; codes uint8 [N, K] and pull [N, K] are kept up to date in
    place. Every change lowers the objective; a row is done when a sweep changes nothing.
    """
    k = codes.shape[1]
    width = k // scale.shape[1]
    lowest = levels[0]
    for n in range(start, stop):
        for _ in range(sweeps):
            changes = 0
            for j in range(k):
                s, curvature = scale[n, j // width], gram[j, j]
                if s == 0 or curvature <= 0:
                    continue
                level = levels[codes[n, j]]
                code = nearest(level + pull[n, j] / (curvature * s), levels, lowest, uniform)
                step = s * (levels[code] - level)
                if step * (np.float32(2.0) * pull[n, j] - step * curvature) <= 0:
                    continue
                codes[n, j] = code
                changes += 1
                for i in range(k):
                    pull[n, i] -= step * gram[j, i]
            if changes == 0:
                break


def is_uniform(levels: Tensor) -> bool:
    """True for consecutive integers."""
    return bool((levels.diff() == 1).all()) and float(levels[0]).is_integer()


def walk(
    w: Tensor,
    factor: Tensor,
    levels: Tensor,
    block: int,
    parameters: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
    vectors: tuple[Codebook | None, Tensor] | None = None,
) -> Tensor:
    """GPTQ's walk over all columns, from left to right.

    Args:
        w: float32 [N, K], columns in walking order.
        factor: float32 [K, K], U of `linalg.inverse_factor`, in the same order.
        levels: float32 [L].
        block: columns per block.
        parameters: called as (start, stop, w[:, start:stop] with all errors so far fed in) when the walk reaches a
            block; returns scale and offset, float32 [stop - start, N], of each column.
        vectors: which codes go together, if not all, and the columns' natural numbers, int64 [K].

    Returns:
        Codes, uint8 [N, K], in walking order.
    """
    rest = w.T.contiguous()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    uniform = is_uniform(levels)
    for a in range(0, len(rest), block):
        b = min(a + block, len(rest))
        scale, offset = parameters(a, b, rest[a:b].T)
        if vectors and (book := vectors[0]):
            current, here = rest[a:b].T.contiguous(), factor[a:b, a:b]
            found, error = walk_vector_block(current, here, scale.T, offset.T, levels, book, vectors[1][a:b])
            found, error = found.T, error.T
        else:
            found, error = _walk_block(rest[a:b], factor[a:b, a:b], scale, offset, levels, uniform)
        codes[a:b] = found
        rest[b:].addmm_(factor[a:b, b:].T, error, alpha=-1)
    return codes.T


def _walk_block(
    w: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool
) -> tuple[Tensor, Tensor]:
    """(codes, errors), [B, N] each, of one block; see `walk_rows`."""
    codes, error = np.empty(w.shape, np.uint8), np.empty(w.shape, np.float32)
    arrays = [t.contiguous().cpu().numpy() for t in (w, factor, scale, offset, levels)]
    over_rows(lambda a, b: walk_rows(*arrays, uniform, codes, error, a, b), codes.shape[1])
    return torch.from_numpy(codes).to(w.device), torch.from_numpy(error).to(w.device)


def descend(
    gram: Tensor, scale: Tensor, levels: Tensor, codes: Tensor, pull: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Improves codes, uint8 [N, K], by coordinate descent; see `descend_rows`. Returns new codes and their pull."""
    better, gradient = (t.cpu().numpy().copy() for t in (codes, pull))
    arrays = [t.contiguous().cpu().numpy() for t in (gram, scale, levels)]
    uniform = is_uniform(levels)
    over_rows(lambda a, b: descend_rows(*arrays, uniform, better, gradient, sweeps, a, b), len(better))
    return torch.from_numpy(better).to(codes.device), torch.from_numpy(gradient).to(pull.device)
