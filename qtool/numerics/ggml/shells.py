"""Where ggml's encoders look for an entry of a codebook: in the nearest shells around what a vector rounds to.

These are `iq2xs_init_impl`, `iq3xs_init_impl` and the `find_best_neighbour` functions of ggml-quants.c
(https://github.com/ggml-org/llama.cpp), whose choices are repeated to the last bit; see `ggml.search`.

Shape letters: E entries, V columns of a vector, M magnitudes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from qtool.numerics.codebooks.codebook import Codebook

LANES = 8
"""Lists of neighbours are multiples of it, so that they fill vector registers."""
PART = 512
"""Vectors whose shells are found at once."""


class Shells(NamedTuple):
    """Where a vector of magnitudes' numbers leads to, read as a number in base M, first column most significant.

    Attributes:
        base: M.
        most: neighbours of a vector.
        begin: int32 [M^V + 1], where its neighbours begin; what is an entry itself has none.
        numbers: int8 [neighbours * V], those of the first column of all neighbours of a vector, then of the second and
            so on; from the nearest neighbour on, in their order in the file; the last one is repeated.
    """

    base: int
    most: int
    begin: np.ndarray
    numbers: np.ndarray


@cache
def shells_of(book: Codebook, count: int) -> Shells:
    """All entries in the nearest `count` shells around every vector; distances are those of the numbers."""
    base, width = len(book.magnitudes), book.width
    entries = book.entries.astype(np.int64)
    every = np.arange(base**width)[:, None] // base ** np.arange(width)[::-1] % base
    sizes, lists = [], []
    for start in range(0, len(every), PART):
        here = every[start : start + PART]
        distance = np.square(here).sum(1)[:, None] + np.square(entries).sum(1) - 2 * here @ entries.T
        farthest = distance.min(1, keepdims=True)
        around = farthest > 0
        for _ in range(count - 1):
            farthest = np.where(distance > farthest, distance, np.iinfo(np.int64).max).min(1, keepdims=True)
        vector, entry = ((distance <= farthest) & around).nonzero()
        order = np.lexsort((entry, distance[vector, entry], vector))
        sizes.append(np.bincount(vector, minlength=len(here)))
        lists.append(entry[order])
    neighbours, size = entries[np.concatenate(lists)], np.concatenate(sizes)
    filled = -(-size // LANES) * LANES
    ends, numbers = np.cumsum(size), np.empty((filled.sum(), width), np.int8)
    begin = np.cumsum(filled) - filled
    for end, count, first, most in zip(ends, size, begin, filled, strict=True):
        repeated = np.minimum(np.arange(most), count - 1) + end - count
        numbers[first : first + most].reshape(width, most)[:] = neighbours[repeated].T
    return Shells(base, int(filled.max()), np.append(begin, filled.sum()).astype(np.int32), numbers.ravel())


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def fill_closest(x, weight, at, width, scale, slope, start, base, begin, numbers, number, total):  # type: ignore[no-untyped-def]
    """Lets number[at : at + V] be the entry next to x there, among those that they lead to; returns if they are none.

    Levels are slope * number + start, times a scale. total [most] is memory. All neighbours are gone through column by
    column, so that sums are in order and yet fill vector registers; that takes indices which cannot be negative.
    """
    key = 0
    for i in range(at, at + width):
        key = key * base + number[i]
    first, count = np.uintp(begin[key] * width), np.uintp(begin[key + 1] - begin[key])
    if count == 0:
        return False
    for k in range(count):
        total[k] = np.float32(0)
    for i in range(width):
        value, weighed, line = x[at + i], weight[at + i], first + np.uintp(i) * count
        for k in range(count):
            miss = scale * (slope * np.float32(numbers[line + k]) + start) - value
            total[k] += weighed * miss * miss
    least, found = np.float32(np.inf), np.uintp(0)
    for k in range(count):
        if total[k] < least:
            least, found = total[k], np.uintp(k)
    for i in range(width):
        number[at + i] = numbers[first + np.uintp(i) * count + found]
    return True
