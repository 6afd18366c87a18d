"""ggml's search for the scales of IQ3_XXS and IQ3_S, repeated to the last bit; see `ggml_search`.

These are `quantize_row_iq3_xxs_impl` and `quantize_row_iq3_s_impl` of ggml-quants.c
(https://github.com/ggml-org/llama.cpp). Each step of a sweep rounds a group of 32 columns to odd numbers up to 15, four
of them at a time; what is no entry of the codebook becomes the best of the entries in the nearest shells around it.

Shape letters: N rows, K columns, S super-blocks of a row, G groups of a row, E entries, T steps.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.codebook import Codebook
from qtool.numerics.parallel import over_rows

F32 = np.float32
GROUP, SUPER, WIDTH = 32, 256, 4
LAST = 7
"""The largest magnitude's number."""


class Kind(NamedTuple):
    """What ggml does for one block type.

    Attributes:
        reach: steps of the sweep on either side of the one that puts the largest weight on the last level.
        even: whether the number of minus signs of 8 columns is even.
        shells: of entries around what is no entry.
        again: whether entries are looked for again at the final scale even where the numbers were entries themselves.
        least: a group whose largest weight is below is taken for zeros.
        stretch: of the super-block's scale.
    """

    reach: int
    even: bool
    shells: int
    again: bool
    least: float
    stretch: float


class Shells(NamedTuple):
    """Where four odd numbers lead to, by their numbers 0 to 7 in base 8, the first column lowest.

    Attributes:
        begin: int32 [8^4 + 1], where the neighbours begin.
        exact: bool [8^4], the numbers are an entry, the only neighbour.
        values: float32 [neighbours, 4], odd numbers.
    """

    begin: np.ndarray
    exact: np.ndarray
    values: np.ndarray


@cache
def shells_of(book: Codebook, count: int) -> Shells:
    """The entries in the nearest `count` shells around all numbers, nearest first, in their order in the file."""
    odd = 2 * book.entries.astype(np.int64) + 1
    numbers = 2 * (np.arange(8**WIDTH)[:, None] >> 3 * np.arange(WIDTH) & LAST) + 1
    begin, lists, exact = [0], [], np.zeros(len(numbers), bool)
    for key, wanted in enumerate(numbers):
        distance = np.square(odd - wanted).sum(1)
        nearest = np.argsort(distance, kind="stable")
        exact[key] = distance[nearest[0]] == 0
        farthest = np.unique(distance)[0 if exact[key] else count - 1]
        lists.append(nearest[: int((distance <= farthest).sum())])
        begin.append(begin[-1] + len(lists[-1]))
    values = odd[np.concatenate(lists)].astype(np.float32)
    return Shells(np.array(begin, np.int32), exact, values)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def closest(size, root, at, scale, values, begin, end):  # type: ignore[no-untyped-def]
    """The first of the neighbours begin to end that is nearest to size[at : at + 4] at a scale."""
    best, found = F32(np.inf), begin
    for k in range(begin, end):
        total = F32(0)
        for i in range(WIDTH):
            miss = scale * values[k, i] - size[at + i]
            total += root[at + i] * miss * miss
        if total < best:
            best, found = total, k
    return found


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def fill_numbers(size, inverse, number):  # type: ignore[no-untyped-def]
    """Fills number [32]: the odd numbers nearest to size [32] are 2 * number + 1."""
    for j in range(GROUP):
        level = np.rint(F32(0.5) * (inverse * size[j] - F32(1)))
        number[j] = np.int32(min(max(level, F32(0)), F32(LAST)))


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def key_of(number, at):  # type: ignore[no-untyped-def]
    """Four of these numbers as one; see `Shells`."""
    return number[at] | number[at + 1] << 3 | number[at + 2] << 6 | number[at + 3] << 9


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def products(size, weight, levels):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) of a group [32]."""
    xl, ll = F32(0), F32(0)
    for j in range(GROUP):
        xl += weight[j] * size[j] * levels[j]
        ll += weight[j] * levels[j] * levels[j]
    return xl, ll


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def fill_levels(size, root, at, key, scale, begin, exact, values, levels):  # type: ignore[no-untyped-def]
    """Fills levels[at : at + 4] for a scale."""
    found = begin[key]
    if not exact[key]:
        found = closest(size, root, at, scale, values, found, begin[key + 1])
    for i in range(WIDTH):
        levels[at + i] = values[found, i]


@njit(nogil=True, cache=True, error_model="numpy")
def group_scale(size, weight, root, most, kind, shells, levels, numbers):  # type: ignore[no-untyped-def]
    """The scale of a group [32] whose largest size is `most`; root: of weight.

    levels [2, 32] and numbers [2, 32] are memory.
    """
    number, again, best_levels, levels = numbers[0], numbers[1], levels[0], levels[1]
    begin, exact, values = shells.begin, shells.exact, shells.values  # once: each access to an array is counted
    best, scale, chosen = F32(0), most / F32(2 * LAST + 1), F32(0)
    for step in range(-kind.reach, kind.reach + 1):
        inverse = (F32(2 * LAST + 1) + F32(step) * F32(0.2)) / most
        fill_numbers(size, inverse, number)
        for at in range(0, GROUP, WIDTH):
            fill_levels(size, root, at, key_of(number, at), F32(1) / inverse, begin, exact, values, levels)
        xl, ll = products(size, weight, levels)
        if ll > 0 and xl * xl > best * ll:
            scale, chosen = xl / ll, inverse
            best = scale * xl
            best_levels[:] = levels
    if chosen == 0:
        return scale
    fill_numbers(size, chosen, number)
    fill_numbers(size, F32(1) / scale, again)
    away = 0
    for at in range(0, GROUP, WIDTH):
        away += not exact[key_of(number, at)]
    if away == 0:
        return scale
    for at in range(0, GROUP, WIDTH):
        if kind.again or not exact[key_of(number, at)]:
            fill_levels(size, root, at, key_of(again, at), scale, begin, exact, values, best_levels)
    xl, ll = products(size, weight, best_levels)
    return xl / ll if ll > 0 else scale


@njit(nogil=True, cache=True, error_model="numpy")
def weigh(x, importance, weight, root):  # type: ignore[no-untyped-def]
    """Fills weight [256], how much ggml lets errors of a super-block x [256] count, and its root."""
    mean = F32(0)
    for j in range(SUPER):
        mean += x[j] * x[j]
    mean = F32(2) * mean / F32(SUPER)
    for j in range(SUPER):
        square = x[j] * x[j]
        weight[j] = importance[j] * np.sqrt(mean + square) if len(importance) else square
        root[j] = np.sqrt(weight[j])


@njit(nogil=True, cache=True, error_model="numpy")
def fill_sizes(x, weight, even, size):  # type: ignore[no-untyped-def]
    """Fills size [32] with those of x [32]; where signs have to be even and are not, the cheapest becomes negative.

    Returns the largest.
    """
    most = F32(-np.inf)
    for first in range(0, GROUP, 8):
        minus, least, at = 0, F32(np.inf), first
        for j in range(first, first + 8):
            size[j] = abs(x[j])
            minus += x[j] < 0
            cost = weight[j] * x[j] * x[j]
            if cost < least:
                least, at = cost, j
        if even and minus % 2:
            size[at] = -size[at]
        most = max(most, size[first : first + 8].max())
    return most


@njit(nogil=True, cache=True, error_model="numpy")
def search_rows(x, importance, kind, shells, d, s, start, stop):  # type: ignore[no-untyped-def]
    """Fills d [N, S] and s [N, G] for rows start to stop of x [N, K]; see `ggml_codebook_scales`."""
    per = SUPER // GROUP
    weight, root, scale = np.empty(SUPER, F32), np.empty(SUPER, F32), np.empty(per, F32)
    size, levels, numbers = np.empty(GROUP, F32), np.empty((2, GROUP), F32), np.empty((2, GROUP), np.int32)
    for n in range(start, stop):
        for b in range(d.shape[1]):
            row = x[n, b * SUPER : (b + 1) * SUPER]
            weigh(row, importance[b * SUPER : (b + 1) * SUPER], weight, root)
            largest = F32(0)
            for g in range(per):
                part = slice(g * GROUP, (g + 1) * GROUP)
                most = fill_sizes(row[part], weight[part], kind.even, size)
                scale[g] = F32(0)
                if most > 0 and most >= F32(kind.least):
                    found = group_scale(size, weight[part], root[part], most, kind, shells, levels, numbers)
                    scale[g] = abs(found)
                largest = max(largest, scale[g])
            d[n, b] = largest / F32(31) * F32(kind.stretch)
            inverse = F32(1) / (largest / F32(31)) if largest > 0 else F32(0)
            for g in range(per):
                level = np.rint(F32(0.5) * (inverse * scale[g] - F32(1)))
                s[n, b * per + g] = min(max(level, F32(0)), F32(15))


def ggml_codebook_scales(x: Tensor, importance: Tensor | None, book: Codebook, kind: Kind) -> tuple[Tensor, Tensor]:
    """What ggml takes.

    Args:
        x: float32 [N, K].
        importance: float32 [K] or None.
        book: of the block type.
        kind: the block type.

    Returns:
        (d, float32 [N, S], not yet in fp16; s, float32 [N, G] of integers).
    """
    known = np.empty(0, np.float32) if importance is None else importance.float().contiguous().cpu().numpy()
    values, shells = x.float().contiguous().cpu().numpy(), shells_of(book, kind.shells)
    d, s = (np.zeros((len(x), x.shape[1] // width), np.float32) for width in (SUPER, GROUP))
    over_rows(lambda a, b: search_rows(values, known, kind, shells, d, s, a, b), len(values))
    return torch.from_numpy(d).to(x.device), torch.from_numpy(s).to(x.device)
