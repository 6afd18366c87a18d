"""Coordinate descent on scales and minima that are integer multiples of shared steps, and on the codes between them.

It minimizes tr(D H D^T), D = W - W_hat, row by row, for w_hat = d a_g level - dmin b_g: as `settle`, one super-block of
columns after the other, whose columns elsewhere learn of all its moves by one product of matrices. In a super-block
first the pair (a, b) of each group moves to the best integers given all else, then d and dmin each to the best step
that fp16 holds, then the codes, then pairs and codes once more.

Shape letters: N rows, K columns, B columns of a super-block, S super-blocks, G groups, W columns of a group.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.sweep import F32, half
from qtool.numerics.solving.descent import fill_inverse, halfway, move_codes
from qtool.numerics.solving.settle import dot, products
from qtool.numerics.threads.parallel import over_rows

TURNS = 2
"""Of pairs and codes in a super-block, in turns; steps move in the first. The error of a matrix is as small after them
as with all parameters by least squares and rounded to multiples, in less than three quarters of the solver's time."""


class Multiples(NamedTuple):
    """Parameters of rows.

    Attributes:
        d, dmin: steps, float32 [N, S] with values of fp16.
        a, b: multiples, float32 [N, G] with integer values.
        minima: whether dmin and b mean something.
        limits: of a and b.
    """

    d: Tensor
    dmin: Tensor
    a: Tensor
    b: Tensor
    minima: bool
    limits: tuple[int, int]


class Limits(NamedTuple):
    """`Multiples.limits` and `minima` as kernels see them."""

    low: np.float32
    top: np.float32
    minima: bool


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def best_pair(wish, wish_o, bend, cross, bend_o, d, dmin, a, b, kind):  # type: ignore[no-untyped-def]
    """(change of the scale, of the offset) that lowers the objective most, three multiples of d being tried.

    wish, wish_o: the gradient along both; bend, cross, bend_o: the curvature.
    """
    paired = kind.minima and dmin != 0 and bend_o > 0
    rest = bend - cross * cross / bend_o if paired else bend
    center = F32(0)
    if d != 0 and rest > 0:
        center = np.rint((wish - (cross * wish_o / bend_o if paired else F32(0))) / (rest * d))
    best, best_s, best_o = F32(0), F32(0), F32(0)
    for i in range(-1, 2):
        s, o = d * (min(max(a + center + F32(i), kind.low), kind.top) - a), F32(0)
        if paired:
            most = np.rint((wish_o - s * cross) / (bend_o * -dmin))
            o = -dmin * (min(max(b + most, kind.low), kind.top) - b)
        gain = s * (F32(2) * wish - s * bend) + o * (F32(2) * wish_o - o * bend_o - F32(2) * s * cross)
        if gain > best:
            best, best_s, best_o = gain, s, o
    return best_s, best_o


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def take_off(x, factor, total):  # type: ignore[no-untyped-def]
    """total -= factor * x."""
    for j in range(len(total)):
        total[j] -= factor * x[j]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def total_of(x):  # type: ignore[no-untyped-def]
    """Sum of x."""
    total = F32(0)
    for j in range(len(x)):
        total += x[j]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def move_pairs(gram, squares, sums, level, kind, d, dmin, a, b, pull, moved, seen):  # type: ignore[no-untyped-def]
    """Moves the pairs of a row's groups in a super-block.

    gram [B, B]; squares [groups, W, W], its diagonal blocks; sums [groups, B], those of its rows in each group; level,
    pull and moved [B]; seen [B] is memory.
    """
    width = len(level) // len(a)
    for g in range(len(a)):
        here = slice(g * width, (g + 1) * width)
        own = seen[:width]
        bend = products(squares[g], level[here], 0, own)
        cross, bend_o = total_of(own), total_of(sums[g, here])
        wish, wish_o = dot(level[here], pull[here]), total_of(pull[here])
        s, o = best_pair(wish, wish_o, bend, cross, bend_o, d, dmin, a[g], b[g], kind)
        if s != 0:
            a[g] += np.rint(s / d)
            products(gram[here], level[here], 0, seen)
            take_off(seen, s, pull)
        if o != 0:
            b[g] -= np.rint(o / dmin)
            take_off(sums[g], o, pull)
        for j in range(g * width, (g + 1) * width):
            moved[j] += s * level[j] + o


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def move_step(step, along, seen, pull, moved):  # type: ignore[no-untyped-def]
    """The best step for what grows with `along` [B], whose product with the Gram matrix is seen [B]."""
    bend, wish = F32(0), F32(0)
    for j in range(len(along)):
        bend += along[j] * seen[j]
        wish += along[j] * pull[j]
    if bend <= 0:
        return step
    move = half(step + wish / bend) - step
    if not move * (F32(2) * wish - move * bend) > 0:
        return step
    for j in range(len(along)):
        pull[j] -= move * seen[j]
        moved[j] += move * along[j]
    return step + move


@njit(nogil=True, cache=True, error_model="numpy")
def move_steps(gram, sums, level, kind, d, dmin, a, b, pull, moved, memory):  # type: ignore[no-untyped-def]
    """The best d, and the best dmin after it; the arguments are those of `move_pairs`, memory [2 and more, B]."""
    seen, along, width = memory[0], memory[1], len(level) // len(a)
    for j in range(len(level)):
        along[j] = a[j // width] * level[j]
    products(gram, along, 0, seen)
    d = move_step(d, along, seen, pull, moved)
    if kind.minima:
        seen[:] = F32(0)
        for g in range(len(b)):
            along[g * width : (g + 1) * width] = -b[g]
            take_off(sums[g], b[g], seen)
        dmin = move_step(dmin, along, seen, pull, moved)
    return d, dmin


@njit(nogil=True, cache=True, error_model="numpy")
def settle_rows(gram, squares, sums, levels, kind, d, dmin, a, b, codes, pull, moved, start, stop):  # type: ignore[no-untyped-def]
    """Moves everything of rows start to stop in a super-block: d, dmin [N], a, b [N, groups]; the rest [N, B].

    gram, squares, sums: see `move_pairs`.
    """
    ends, memory, groups = halfway(levels), np.empty((4, codes.shape[1]), F32), a.shape[1]
    level, scale, curvature = memory[3], np.empty(groups, F32), np.diag(gram).copy()
    for n in range(start, stop):
        moved[n] = F32(0)
        for turn in range(TURNS):
            for j in range(len(level)):
                level[j] = levels[codes[n, j]]
            move_pairs(gram, squares, sums, level, kind, d[n], dmin[n], a[n], b[n], pull[n], moved[n], memory[0])
            if turn == 0:
                d[n], dmin[n] = move_steps(
                    gram, sums, level, kind, d[n], dmin[n], a[n], b[n], pull[n], moved[n], memory
                )
            for g in range(groups):
                scale[g] = d[n] * a[n, g]
            fill_inverse(curvature, scale, memory[0], memory[1])
            if move_codes(gram, memory[0], memory[1], levels, ends, codes[n], pull[n], moved[n], memory[2]) == 0:
                break


def settle_multiples(
    gram: Tensor, levels: Tensor, params: Multiples, codes: Tensor, pull: Tensor
) -> tuple[Multiples, Tensor, Tensor]:
    """One pass over all columns.

    Args:
        gram: H, float32 [K, K].
        levels: float32 [L], ascending.
        params: of the rows.
        codes: uint8 [N, K].
        pull: float32 [N, K], (W - W_hat) H.

    Returns:
        New parameters, codes and their pull.
    """
    codes, pull = (t.clone(memory_format=torch.contiguous_format) for t in (codes, pull))
    found = [t.clone(memory_format=torch.contiguous_format) for t in params[:4]]
    d, dmin, a, b = found
    kind = Limits(F32(params.limits[0]), F32(params.limits[1]), params.minima)
    block, groups = codes.shape[1] // d.shape[1], a.shape[1] // d.shape[1]
    for s in range(d.shape[1]):
        here, those = slice(s * block, (s + 1) * block), slice(s * groups, (s + 1) * groups)
        square, moved = gram[here, here].contiguous(), torch.empty(len(codes), block)
        sums = square.view(groups, -1, block).sum(1)
        squares = square.view(groups, block // groups, groups, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        fixed = square.numpy(), squares.contiguous().numpy(), sums.numpy(), levels.numpy(), kind
        parts = [d[:, s], dmin[:, s], a[:, those], b[:, those], codes[:, here], pull[:, here]]
        own = [part.contiguous() for part in parts]  # rows side by side, as kernels have to know when they are compiled
        over_rows(partial(settle_rows, *fixed, *(t.numpy() for t in own), moved.numpy()), len(codes))
        for part, new in zip(parts, own, strict=True):
            part.copy_(new)
        for elsewhere in (slice(0, here.start), slice(here.stop, None)):
            pull[:, elsewhere].addmm_(moved, gram[here, elsewhere], alpha=-1)
    return Multiples(found[0], found[1], found[2], found[3], params.minima, params.limits), codes, pull
