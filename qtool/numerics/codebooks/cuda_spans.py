"""The search for the allowed vectors of least cost on CUDA devices, as Triton functions that kernels call.

What a vector of levels q costs in a metric A is |t - s q|^2 = t A t - 2 s (t A) q + s^2 q A q: the first term is the
same for all q, and q A q for all rows. So all vectors that a codebook allows are gone through, a few operations each,
and none is left out that a search could miss. A span of two vectors, which share a parity of signs, is taken as
`spans` takes it: for either parity of the first one its best entry, whatever is right of it being free to make up for
it, then the best second one beside it.

Shape letters: S spans, B columns of all, V columns of a vector, C allowed vectors, of all parities, R rows of a
program.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook


class Allowed(NamedTuple):
    """All vectors that a codebook allows, signs among them: those with an even number of minus signs first.

    Attributes:
        levels: float32 [V, C].
        codes: uint8 [V, C].
        paired: whether a span is two vectors, whose parities have to agree.
    """

    levels: Tensor
    codes: Tensor
    paired: bool


@cache
def allowed(book: Codebook, device: torch.device) -> Allowed:
    """Of a codebook.

    Raises:
        ValueError: spans of several vectors that are not two with a parity of signs.
    """
    paired = book.span > book.width
    if paired and (book.span > 2 * book.width or book.signs != "even"):
        raise ValueError(f"spans of {book.span // book.width} vectors with {book.signs} signs")
    entries, magnitudes, count = torch.from_numpy(book.entries), torch.from_numpy(book.magnitudes), len(book.magnitudes)
    if book.signs == "none":
        return Allowed(magnitudes[entries.long()].T.contiguous().to(device), entries.T.contiguous().to(device), False)
    minus = torch.arange(1 << book.width)[:, None] >> torch.arange(book.width) & 1
    odd = minus.sum(1) % 2
    if book.signs == "even":
        minus = torch.cat([minus[odd == 0], minus[odd == 1]]) if paired else minus[odd == 0]
    levels = (1 - 2 * minus).float()[:, None] * magnitudes[entries.long()]
    codes = torch.where(minus.bool()[:, None], count - 1 - entries.long(), count + entries.long()).to(torch.uint8)
    flat, numbers = (x.view(-1, book.width).T.contiguous().to(device) for x in (levels, codes))
    return Allowed(flat, numbers, paired)


class Metrics(NamedTuple):
    """What the search for a span needs of its metric.

    Attributes:
        first: float32 [S, V, V], of the first vector while the second one is free.
        second: float32 [S, V, V], of the second vector.
        back: float32 [S, V, V], how the best second one answers to what the first one misses.
        curved: float32 [1 or 2, S, C], q A q in both.
    """

    first: Tensor
    second: Tensor
    back: Tensor
    curved: Tensor


def metrics_of(wide: Tensor, book: Allowed) -> Metrics:
    """Of metrics [S, B / S, B / S], float64."""
    v = len(book.levels)
    first = second = back = wide
    if book.paired:
        second = wide[:, v:, v:]
        back = torch.cholesky_solve(wide[:, v:, :v], torch.linalg.cholesky(second)).mT
        first = wide[:, :v, :v] - back @ wide[:, v:, :v]
    first, second, back = (x.float().contiguous() for x in (first, second, back))
    levels = book.levels.T
    curved = [(levels @ x).mul_(levels).sum(-1) for x in ((first, second) if book.paired else (first,))]
    return Metrics(first, second, back, torch.stack(curved))


@triton.jit
def column(x, j, k: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column k of a tensor [R, V] whose columns' numbers are j."""
    return tl.sum(tl.where(j[None, :] == k, x, 0.0), 1)


@triton.jit
def times(x, matrix, stride, j):  # type: ignore[no-untyped-def]
    """[R, V] times the [V, V] at `matrix`, whose rows lie `stride` apart."""
    return tl.sum(x[:, :, None] * tl.load(matrix + j[:, None] * stride + j[None, :])[None, :, :], 1)


@triton.jit
def best(  # type: ignore[no-untyped-def]
    target, s, metric, curved, levels, begin, end, total, j, width: tl.constexpr, rows: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    """(number of the vector of least cost between begin and end, int32 [R]; its cost less that of zeros [R]).

    target [R, V]; scale s [R]; metric [V, V]; curved [total]; levels [V, total].
    """
    left, square, c = times(target, metric, width, j) * (-2 * s)[:, None], s * s, tl.arange(0, chunk)
    l0, l1, l2, l3 = column(left, j, 0), column(left, j, 1), column(left, j, 2), column(left, j, 3)
    if width == 8:
        l4, l5, l6, l7 = column(left, j, 4), column(left, j, 5), column(left, j, 6), column(left, j, 7)
    least, place = tl.full([rows, chunk], float("inf"), tl.float32), tl.zeros([rows, chunk], tl.int32)
    for a in range(begin, end, chunk):
        here = levels + a + c
        cost = square[:, None] * tl.load(curved + a + c)[None, :] + l0[:, None] * tl.load(here)[None, :]
        cost += l1[:, None] * tl.load(here + total)[None, :]
        cost += l2[:, None] * tl.load(here + 2 * total)[None, :]
        cost += l3[:, None] * tl.load(here + 3 * total)[None, :]
        if width == 8:
            cost += l4[:, None] * tl.load(here + 4 * total)[None, :]
            cost += l5[:, None] * tl.load(here + 5 * total)[None, :]
            cost += l6[:, None] * tl.load(here + 6 * total)[None, :]
            cost += l7[:, None] * tl.load(here + 7 * total)[None, :]
        lower = cost < least
        least, place = tl.where(lower, cost, least), tl.where(lower, a + c[None, :], place)
    cost = tl.min(least, 1)
    return tl.min(tl.where(least == cost[:, None], place, total - 1), 1), cost


@triton.jit
def search(  # type: ignore[no-untyped-def]
    x, y, s, first, second, back, curved, levels, total, i, spans, j, paired: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Numbers of the best vectors of span i, int32 [R] each, for targets x and y [R, V]; y counts where `paired`."""
    first, second, back = first + i * width * width, second + i * width * width, back + i * width * width
    lefts, rights = curved + i * total, curved + (spans + i) * total
    half = total // 2 if paired else total
    a, cost = best(x, s, first, lefts, levels, 0, half, total, j, width, rows, chunk)
    b = a
    if paired:
        wish = y + times(x - s[:, None] * tl.load(levels + j[None, :] * total + a[:, None]), back, width, j)
        b, more = best(wish, s, second, rights, levels, 0, half, total, j, width, rows, chunk)
        cost += more + tl.sum(times(wish, second, width, j) * wish, 1)
        other, odd = best(x, s, first, lefts, levels, half, total, total, j, width, rows, chunk)
        wish = y + times(x - s[:, None] * tl.load(levels + j[None, :] * total + other[:, None]), back, width, j)
        beside, more = best(wish, s, second, rights, levels, half, total, total, j, width, rows, chunk)
        lower = odd + more + tl.sum(times(wish, second, width, j) * wish, 1) < cost
        a, b = tl.where(lower, other, a), tl.where(lower, beside, b)
    return a, b
