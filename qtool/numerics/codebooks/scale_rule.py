"""How formats with codebooks store scales, and how much their search tries; see `vector_search`."""

from __future__ import annotations

from typing import NamedTuple

from qtool.numerics.codebooks.codebook import NEIGHBORS


class ScaleRule(NamedTuple):
    """How scales are stored.

    Attributes:
        group: columns that share s.
        unit: of a scale, in d.
        top: largest s.
        delta: size of shifts; 0 if there are none.
        segment: columns that share a shift; divides `group`.
        low, high: where a group's sweep begins and ends, relative to its root mean square.
    """

    group: int
    unit: float
    top: int
    delta: float
    segment: int
    low: float
    high: float


class VectorEffort(NamedTuple):
    """How much is tried.

    Attributes:
        steps: of a group's sweep.
        multipliers: steps of the sweep over d.
        starts: values of d that are followed up.
        rounds: turns of (s, shifts, codes) and d for each of them.
        around: values of s tried on both sides of the rounded one.
        close: entries near a vector that are compared.
    """

    steps: int
    multipliers: int
    starts: int
    rounds: int
    around: int
    close: int


EFFORT = {
    "fast": (VectorEffort(6, 32, 1, 1, 0, 4), VectorEffort(3, 32, 1, 0, 0, 3)),
    "default": (VectorEffort(10, 64, 1, 2, 1, NEIGHBORS), VectorEffort(5, 64, 1, 1, 1, NEIGHBORS)),
    "thorough": (VectorEffort(40, 256, 4, 3, 2, NEIGHBORS), VectorEffort(20, 256, 4, 1, 2, NEIGHBORS)),
}
"""For codebooks without shifts and with them, where both shifts are tried each time."""

AGAIN = 1
"""Steps of a sweep from the best scale so far, as least squares closed it."""
