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


class Tables(NamedTuple):
    """A codebook as kernels see it, entries ordered by their first half.

    Attributes:
        magnitudes: float32 [M], levels without signs.
        middles: float32 [M - 1], where the nearest magnitude changes.
        entries: uint8 [E, V].
        first: int32 [H + 1], where the entries of each first half begin.
        second: int32 [E], their second halves.
        start: int32 [M^V], by the nearest magnitudes of a vector as a number in base M: that entry, or if there is no
            such entry -1 minus the one at least distance from it.
        signed, even: whether there are signs, and whether their number is even.
        span: see `Codebook`.
    """

    magnitudes: np.ndarray
    middles: np.ndarray
    entries: np.ndarray
    first: np.ndarray
    second: np.ndarray
    start: np.ndarray
    signed: bool
    even: bool
    span: int


@dataclass(frozen=True, eq=False)
class Codebook:
    """Allowed combinations.

    A code indexes L ascending levels. Without signs it is a magnitude; with signs the levels are symmetric, and
    magnitude m is code M + m, or M - 1 - m where it is negative.

    Attributes:
        entries: uint8 [E, V], magnitudes.
        magnitudes: float32 [M], ascending.
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
        ordered = Codebook(np.ascontiguousarray(self.entries[order]), self.magnitudes, self.signs, self.span)
        signed, even = self.signs != "none", self.signs == "even"
        middles = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        start = ordered.nearest_entries()
        return Tables(
            self.magnitudes, middles, ordered.entries, begins, second.astype(np.int32), start, signed, even, self.span
        )

    def nearest_entries(self) -> np.ndarray:
        """See `Tables.start`."""
        base = len(self.magnitudes)
        patterns = self.magnitudes[np.arange(base**self.width)[:, None] // base ** np.arange(self.width)[::-1] % base]
        values = self.magnitudes[self.entries]
        nearest = (patterns @ values.T - np.square(values).sum(1) / 2).argmax(1)
        return np.where(self.index >= 0, self.index, -1 - nearest).astype(np.int32)
