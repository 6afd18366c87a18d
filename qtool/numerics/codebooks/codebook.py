"""Codebooks: which combinations of codes neighbouring columns may have, and the nearest of them.

A vector of V columns takes one of E entries. An entry says the magnitude of each column; where a codebook has signs,
each column has its own, all of them free, or with an even number of minus signs in every `span` columns.

Shape letters: E entries, V columns of a vector (4 or 8), M magnitudes, L levels (M, or 2 M with signs), H combinations
of half a vector (M^(V/2)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from qtool.numerics.codebooks.lanes import LANES

NEIGHBORS = LANES
"""Entries that a vector's nearest magnitudes lead to, each in a lane of its own."""
PART = 1024
"""Combinations of magnitudes whose neighbors are found at once."""


class Tables(NamedTuple):
    """A codebook as kernels see it, entries ordered by their first half.

    Attributes:
        magnitudes: float32 [M], levels without signs.
        middles: float32 [M - 1], where the nearest magnitude changes.
        entries: uint8 [E, V].
        values: float32 [E, V], their magnitudes.
        first: int32 [H + 1], where the entries of each first half begin.
        second: int32 [E], their second halves.
        close: int16 [M^V, NEIGHBORS], by the nearest magnitudes of a vector as a number in base M: the entries at least
            distance from these, in order of it; the first as -1 - entry if it is not the very same magnitudes.
        levels: int8 [M^V, V, NEIGHBORS], magnitudes of the entries of `close`.
        signed, even: whether there are signs, and whether their number is even.
        span: see `Codebook`.
        lanes, steps: the columns of a vector, and numbers of the middles, as tuples: kernels know their lengths, which
            are V and M - 1, when they are compiled.
    """

    magnitudes: np.ndarray
    middles: np.ndarray
    entries: np.ndarray
    values: np.ndarray
    first: np.ndarray
    second: np.ndarray
    close: np.ndarray
    levels: np.ndarray
    signed: bool
    even: bool
    span: int
    lanes: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Allowed combinations.

    A code indexes L ascending levels. Without signs it is a magnitude; with signs the levels are symmetric, and
    magnitude m is code M + m, or M - 1 - m where it is negative.

    Attributes:
        entries: uint8 [E, V], magnitudes.
        magnitudes: float32 [M], ascending; whole numbers that int8 holds.
        signs: "none", "free", or "even": an even number of minus signs in every `span` columns.
        span: columns whose codes depend on each other; a multiple of V.
    """

    entries: np.ndarray
    magnitudes: np.ndarray
    signs: Literal["none", "free", "even"]
    span: int

    @property
    def width(self) -> int:
        """V."""
        return int(self.entries.shape[1])

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [E], entries read as numbers in base M, first column most significant."""
        places = len(self.magnitudes) ** np.arange(self.width)[::-1]
        return self.entries.astype(np.int64) @ places

    @cached_property
    def index(self) -> np.ndarray:
        """int32 [M^V], entry by its number in base M; -1 where there is none."""
        table = np.full(len(self.magnitudes) ** self.width, -1, np.int32)
        table[self.keys] = np.arange(len(self.entries))
        return table

    @cached_property
    def tables(self) -> Tables:
        """For kernels."""
        halves = len(self.magnitudes) ** (self.width // 2)
        order = self.keys.argsort(kind="stable")
        first, second = np.divmod(self.keys[order], halves)
        begins = np.searchsorted(first, np.arange(halves + 1)).astype(np.int32)
        entries = np.ascontiguousarray(self.entries[order])
        middles = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        close = closest_entries(entries, self.magnitudes)
        return Tables(
            self.magnitudes,
            middles,
            entries,
            self.magnitudes[entries],
            begins,
            second.astype(np.int32),
            close,
            neighbor_levels(entries, self.magnitudes, close),
            self.signs != "none",
            self.signs == "even",
            self.span,
            tuple(range(self.width)),
            tuple(range(len(middles))),
        )


def closest_entries(entries: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """See `Tables.close`; entries uint8 [E, V], magnitudes float32 [M]."""
    base, width = len(magnitudes), entries.shape[1]
    places = base ** np.arange(width)[::-1]
    values = magnitudes[entries]
    close = np.empty((base**width, NEIGHBORS), np.int16)
    for start in range(0, len(close), PART):
        digits = np.arange(start, min(start + PART, len(close)))[:, None] // places % base
        distance = np.square(values).sum(1) / 2 - magnitudes[digits] @ values.T
        nearest = np.argpartition(distance, NEIGHBORS, axis=1)[:, :NEIGHBORS]
        nearest = np.take_along_axis(nearest, np.take_along_axis(distance, nearest, 1).argsort(1, kind="stable"), 1)
        exact = (entries[nearest[:, 0]] == digits).all(1)
        nearest[:, 0] = np.where(exact, nearest[:, 0], -1 - nearest[:, 0])
        close[start : start + len(digits)] = nearest
    return close


def neighbor_levels(entries: np.ndarray, magnitudes: np.ndarray, close: np.ndarray) -> np.ndarray:
    """See `Tables.levels`."""
    numbers, small = np.maximum(close, -1 - close), magnitudes.astype(np.int8)
    assert (small == magnitudes).all()
    return np.ascontiguousarray(small[entries][numbers].transpose(0, 2, 1))
