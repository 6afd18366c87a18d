"""Codebooks: which combinations of codes neighbouring columns may have.

A vector of V columns takes one of E entries. An entry says the magnitude of each column; where a codebook has signs,
each column has its own, all of them free, or with an even number of minus signs in every `span` columns.

Shape letters: E entries, V columns of a vector, M magnitudes, L levels (M, or 2 M with signs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class Codebook:
    """Allowed combinations.

    A code indexes L ascending levels. Without signs it is a magnitude; with signs the levels are symmetric, and
    magnitude m is code M + m, or M - 1 - m where it is negative.

    Attributes:
        entries: uint8 [E, V], magnitudes.
        magnitudes: M.
        signs: "none", "free", or "even": an even number of minus signs in every `span` columns.
        span: columns whose codes depend on each other; a multiple of V.
    """

    entries: np.ndarray
    magnitudes: int
    signs: Literal["none", "free", "even"]
    span: int

    @property
    def width(self) -> int:
        """V."""
        return int(self.entries.shape[1])

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [E], entries read as numbers in base M, first column most significant."""
        places = self.magnitudes ** np.arange(self.width)[::-1]
        return self.entries.astype(np.int64) @ places

    @cached_property
    def index(self) -> np.ndarray:
        """int32 [M^V], entry by key; -1 where there is none."""
        table = np.full(self.magnitudes**self.width, -1, np.int32)
        table[self.keys] = np.arange(len(self.entries))
        return table
