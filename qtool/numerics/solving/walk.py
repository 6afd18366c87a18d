"""The column walk of GPTQ, as a compiled kernel over rows.

It minimizes tr(D H D^T), D = W - W_hat, one row at a time, for a grid `w_hat = scale * level + offset` whose
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
from qtool.numerics.grids.affine import middles
from qtool.numerics.grids.scale_codes import EXACT, CodedScales
from qtool.numerics.scales.search import FAST, IntegerScales, reach, relative
from qtool.numerics.solving.coded_walk import walk_coded
from qtool.numerics.solving.integer_walk import walk_integers, walks
from qtool.numerics.solving.vector_walk import walk_vector_block
from qtool.numerics.threads.parallel import over_rows

BLOCK = 128
"""Columns behind which all that lies to the right is updated; up to there, each block updates the next ones."""

LANES = 256
"""Rows that are walked together: their part of a block stays in the cache."""


@njit(nogil=True, cache=True, fastmath=FAST)
def nearest(x, middles, code):  # type: ignore[no-untyped-def]
    """Fills code, int32 [n], with the indices of the levels nearest to x [n], by bisection without branches.

    middles: between neighbouring levels, ascending, filled up with infinity to a power of two less one.
    """
    step = (len(middles) + 1) // 2
    code[:] = 0
    while step > 0:
        for n in range(len(x)):
            code[n] += step if x[n] > middles[code[n] + step - 1] else 0
        step //= 2


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def take_four(w, factor, error, j, rows):  # type: ignore[no-untyped-def]
    """Takes the errors of four columns from `j` on off some rows of all columns behind them, one after the other.

    What is taken off is loaded and stored once for all four; the arguments are those of `walk_rows`.
    """
    e0, e1, e2, e3 = error[j, rows], error[j + 1, rows], error[j + 2, rows], error[j + 3, rows]
    for i in range(j + 4, len(w)):
        u0, u1, u2, u3, later = factor[j, i], factor[j + 1, i], factor[j + 2, i], factor[j + 3, i], w[i, rows]
        for n in range(len(later)):
            later[n] = (((later[n] - e0[n] * u0) - e1[n] * u1) - e2[n] * u2) - e3[n] * u3


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def walk_rows(w, factor, scale, offset, levels, middles, codes, error, start, stop):  # type: ignore[no-untyped-def]
    """Walks the B columns of a block for rows start to stop.

    Columns lie in memory one after the other, because they wait for each other while rows go side by side: w [B, N] is
    overwritten; factor [B, B] is the block of the inverse factor U; scale, offset [B, N]; codes uint8 [B, N] and error
    [B, N] are filled, error being D_j / U_jj. middles: see `nearest`; none if levels are consecutive integers.
    """
    lowest, highest = levels[0], levels[0] + np.float32(len(levels) - 1)
    found, quotient = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    for first in range(start, stop, LANES):
        rows = slice(first, min(first + LANES, stop))
        for j in range(len(w)):
            x, s, o, e, code = w[j, rows], scale[j, rows], offset[j, rows], error[j, rows], codes[j, rows]
            inverse = np.float32(1.0) / factor[j, j]
            if len(middles) == 0:
                for n in range(len(x)):
                    level = min(max(np.rint((x[n] - o[n]) / s[n]), lowest), highest) if s[n] != 0 else lowest
                    code[n] = np.uint8(level - lowest)
                    e[n] = (x[n] - (s[n] * level + o[n])) * inverse
            else:
                for n in range(len(x)):
                    quotient[n] = (x[n] - o[n]) / s[n] if s[n] != 0 else levels[0]
                nearest(quotient[: len(x)], middles, found[: len(x)])
                for n in range(len(x)):
                    code[n] = np.uint8(found[n])
                    e[n] = (x[n] - (s[n] * levels[found[n]] + o[n])) * inverse
            if j % 4 == 3:
                take_four(w, factor, error, j - 3, rows)
                continue
            for i in range(j + 1, min(j // 4 * 4 + 4, len(w))):
                u, later = factor[j, i], w[i, rows]
                for n in range(len(x)):
                    later[n] -= e[n] * u


def is_uniform(levels: Tensor) -> bool:
    """True for consecutive integers, which are rounded to."""
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
        w: float32 [N, K], columns in walking order; written over where the numbers of each lie side by side.
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
    between = (levels.new_empty(0) if is_uniform(levels) else middles(levels)).to(w.device)
    ends, table = (float(levels[0]), float(levels[0]) + len(levels) - 1), levels.to(w.device)
    errors = rest.new_empty(max(block, BLOCK // block * block), rest.shape[1])
    for first in range(0, len(rest), len(errors)):
        last = min(first + len(errors), len(rest))
        for a in range(first, last, block):
            b = min(a + block, last)
            scale, offset = parameters(a, b, rest[a:b].T)
            here = factor[a:b, a:b]
            if vectors and (book := vectors[0]):
                current = rest[a:b].T.contiguous()
                found, error = walk_vector_block(current, here, scale.T, offset.T, levels, book, vectors[1][a:b])
                found, error = found.T, error.T
            else:
                found, error = _walk_block(rest[a:b], here, scale, offset, table, between, ends)
            codes[a:b], errors[a - first : b - first] = found, error
            rest[b:last].addmm_(factor[a:b, b:last].T, error, alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].T, errors[: last - first], alpha=-1)
    return codes.T


def searches(rule: CodedScales | IntegerScales, cuda: bool = True) -> bool:
    """Whether `walk_searching` takes such scales there."""
    if isinstance(rule, CodedScales):
        return True
    return rule.columns % 16 == 0 and BLOCK % rule.columns == 0 if cuda else walks(rule)


def walk_searching(
    w: Tensor,
    factor: Tensor,
    levels: Tensor,
    rule: CodedScales | IntegerScales,
    weight: Tensor,
    order: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The walk where each group's scale is searched when the walk gets there; see `searches`.

    It gives what `walk` does with the format's own search as its parameters, `BLOCK` columns at a time.

    Args:
        w: float32 [N, K], columns in walking order, those of a group side by side.
        factor: float32 [K, K], see `walk`.
        levels: float32 [L].
        rule: how scales are searched.
        weight: float32 [K], importance of the columns' squared errors, in the same order.
        order: the columns' natural numbers, int64 [K]; None: they are in their order. On the CPU searches of integers
            sum up in that one, and so find what the format's own does.

    Returns:
        Codes, uint8 [N, K], in walking order, and what was found for each group, [N, G]: codes of scales, uint8; or of
        integers the scales and, if they have any, zero points, float32.
    """
    if isinstance(rule, IntegerScales) and not w.is_cuda:
        places = (torch.arange(len(weight)) if order is None else order) % rule.columns
        natural = places.view(-1, rule.columns).argsort(1)
        counts = relative(weight.view(natural.shape).gather(1, natural).flatten(), len(weight), len(natural))
        return walk_integers(w, factor, rule, places, counts, reach(counts))
    counts = relative(weight, len(weight), len(weight) // rule.columns)
    if isinstance(rule, IntegerScales):
        from qtool.numerics.solving import cuda_integers

        return cuda_integers.walk_integers(w, factor, rule, counts, reach(counts))
    if not w.is_cuda:
        codes, found = walk_coded(w, factor, rule, counts, reach(counts))
        return codes, (found,)
    from qtool.numerics.solving import cuda_walk

    table, between = levels.to(w.device), middles(levels).to(w.device)
    codes, found = cuda_walk.walk_coded(w, factor, table, between, rule, counts, reach(counts))
    return codes, (found,)


def _walk_block(
    w: Tensor,
    factor: Tensor,
    scale: Tensor,
    offset: Tensor,
    levels: Tensor,
    between: Tensor,
    ends: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """(codes, errors), [B, N] each, of one block; see `walk_rows`."""
    if w.is_cuda:
        from qtool.numerics.solving import cuda_walk

        return cuda_walk.walk_block(w, factor, scale, offset, levels, between, ends)
    codes, error = np.empty(w.shape, np.uint8), np.empty(w.shape, np.float32)
    arrays = [t.contiguous().cpu().numpy() for t in (w, factor, scale, offset, levels, between)]
    over_rows(lambda a, b: walk_rows(*arrays, codes, error, a, b), codes.shape[1])
    return torch.from_numpy(codes).to(w.device), torch.from_numpy(error).to(w.device)
