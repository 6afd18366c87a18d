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
"""Of pairs, steps and codes in a super-block, in turns. The error of a matrix is as small after them
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
        if s != 0 or o != 0:
            take_off(level[here], -s, moved[here])
            moved[here] += o


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
def fill_along(a, level, along):  # type: ignore[no-untyped-def]
    """Fills along [B] with what w_hat grows by with d: level [B] times a [groups]."""
    width = len(level) // len(a)
    for g in range(len(a)):
        here, factor = slice(g * width, (g + 1) * width), a[g]
        part, out = level[here], along[here]
        for j in range(len(out)):
            out[j] = factor * part[j]


@njit(nogil=True, cache=True, error_model="numpy")
def move_steps(kind, d, dmin, a, b, level, along, seen, seen_min, pull, moved):  # type: ignore[no-untyped-def]
    """The best d, and the best dmin after it; seen and seen_min [B] are what grows with them times the Gram matrix.

    a, b [groups]; level [B]; along [B] is memory; pull and moved [B] are kept up to date.
    """
    width = len(level) // len(a)
    fill_along(a, level, along)
    d = move_step(d, along, seen, pull, moved)
    if kind.minima:
        for g in range(len(b)):
            along[g * width : (g + 1) * width] = -b[g]
        dmin = move_step(dmin, along, seen_min, pull, moved)
    return d, dmin


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def follow(sums, d, dmin, b, old, before, pull, seen, seen_min):  # type: ignore[no-untyped-def]
    """Brings seen and seen_min [B] up to date, behind moves of pairs and codes: pull [B] tells what these did.

    b and old [groups]: the multiples and those before the moves; before [B]: the pull before them, written over.
    """
    for g in range(len(b)):
        if b[g] != old[g]:
            take_off(sums[g], b[g] - old[g], seen_min)
            take_off(sums[g], dmin * (old[g] - b[g]), before)
    inverse = F32(1) / d if d != 0 else F32(0)
    for j in range(len(seen)):
        seen[j] += (before[j] - pull[j]) * inverse


@njit(nogil=True, cache=True, error_model="numpy")
def fill_levels(levels, codes, level):  # type: ignore[no-untyped-def]
    """Fills level [B] with those of codes [B]."""
    for j in range(len(level)):
        level[j] = levels[codes[j]]


@njit(nogil=True, cache=True, error_model="numpy")
def pair_rows(gram, squares, sums, levels, kind, d, dmin, a, b, codes, pull, moved, along, start, stop):  # type: ignore[no-untyped-def]
    """Moves the pairs of rows start to stop in a super-block: d, dmin [N], a, b [N, groups]; the rest [N, B].

    gram, squares, sums: see `move_pairs`. Fills along, by how much w_hat grows with d.
    """
    level, memory = np.empty(codes.shape[1], F32), np.empty(codes.shape[1], F32)
    for n in range(start, stop):
        fill_levels(levels, codes[n], level)
        move_pairs(gram, squares, sums, level, kind, d[n], dmin[n], a[n], b[n], pull[n], moved[n], memory)
        fill_along(a[n], level, along[n])


@njit(nogil=True, cache=True, error_model="numpy")
def rest_rows(gram, squares, sums, levels, kind, d, dmin, a, b, codes, pull, moved, seen, seen_min, start, stop):  # type: ignore[no-untyped-def]
    """Moves steps and codes of rows start to stop, and in further turns pairs as well; see `pair_rows`.

    seen and seen_min [N, B]: see `move_steps`.
    """
    ends, memory, groups = halfway(levels), np.empty((5, codes.shape[1]), F32), a.shape[1]
    level, before, old = memory[3], memory[4], np.empty(groups, F32)
    scale, curvature = np.empty(groups, F32), np.diag(gram).copy()
    for n in range(start, stop):
        for turn in range(TURNS):
            fill_levels(levels, codes[n], level)
            if turn > 0:
                move_pairs(gram, squares, sums, level, kind, d[n], dmin[n], a[n], b[n], pull[n], moved[n], memory[0])
                follow(sums, d[n], dmin[n], b[n], old, before, pull[n], seen[n], seen_min[n])
            d[n], dmin[n] = move_steps(
                kind, d[n], dmin[n], a[n], b[n], level, memory[0], seen[n], seen_min[n], pull[n], moved[n]
            )
            before[:], old[:] = pull[n], b[n]
            for g in range(groups):
                scale[g] = d[n] * a[n, g]
            fill_inverse(curvature, scale, memory[0], memory[1])
            if move_codes(gram, memory[0], memory[1], levels, ends, codes[n], pull[n], moved[n], memory[2]) == 0:
                break


def settle_super_block(square: Tensor, levels: Tensor, kind: Limits, own: list[Tensor]) -> Tensor:
    """Moves everything in a super-block but the pull of columns elsewhere, in place; returns the changes of w_hat.

    Args:
        square: float32 [B, B], of the Gram matrix.
        levels: float32 [L].
        kind: of the parameters.
        own: d and dmin [N], a and b [N, groups], codes and pull [N, B]: rows side by side, as kernels have to know when
            they are compiled.
    """
    b, (n, block), groups = own[3], own[4].shape, own[3].shape[1]
    sums = square.view(groups, -1, block).sum(1)
    squares = square.view(groups, block // groups, groups, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    moved, along = torch.zeros(n, block), torch.empty(n, block)
    fixed = square.numpy(), squares.numpy(), sums.numpy(), levels.numpy(), kind
    arrays = [t.numpy() for t in (*own, moved)]
    over_rows(partial(pair_rows, *fixed, *arrays, along.numpy()), n)
    seen = along @ square  # of all rows at once, which takes a third of the time of one by one
    seen_min = torch.mm(b, sums).neg_() if kind.minima else seen
    over_rows(partial(rest_rows, *fixed, *arrays, seen.numpy(), seen_min.numpy()), n)
    return moved


def settle_multiples(
    gram: Tensor, levels: Tensor, params: Multiples, codes: Tensor, rest: Tensor
) -> tuple[Multiples, Tensor, Tensor]:
    """One pass over all columns.

    The pull of a super-block is found when the pass gets there, and from then on kept up to date.

    Args:
        gram: H, float32 [K, K].
        levels: float32 [L], ascending.
        params: of the rows.
        codes: uint8 [N, K].
        rest: float32 [N, K], W - W_hat.

    Returns:
        New parameters, codes and their pull, (W - W_hat) H.
    """
    codes, rest = (t.clone(memory_format=torch.contiguous_format) for t in (codes, rest))
    pull = torch.empty_like(rest)
    found = [t.clone(memory_format=torch.contiguous_format) for t in params[:4]]
    d, dmin, a, b = found
    kind = Limits(F32(params.limits[0]), F32(params.limits[1]), params.minima)
    block, groups = codes.shape[1] // d.shape[1], a.shape[1] // d.shape[1]
    for s in range(d.shape[1]):
        here, those = slice(s * block, (s + 1) * block), slice(s * groups, (s + 1) * groups)
        torch.mm(rest, gram[:, here], out=pull[:, here])
        parts = [d[:, s], dmin[:, s], a[:, those], b[:, those], codes[:, here], pull[:, here]]
        own = [part.contiguous() for part in parts]
        moved = settle_super_block(gram[here, here].contiguous(), levels, kind, own)
        for part, new in zip(parts, own, strict=True):
            part.copy_(new)
        rest[:, here] -= moved
        pull[:, : here.start].addmm_(moved, gram[here, : here.start], alpha=-1)
    return Multiples(found[0], found[1], found[2], found[3], params.minima, params.limits), codes, pull
