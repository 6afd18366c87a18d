"""Lanes compute what numpy does, number by number."""

from __future__ import annotations

import numpy as np
from numba import njit

from qtool.numerics.codebooks.lanes import (
    LANES,
    address,
    any_less,
    least_lane,
    load,
    load_small,
    number,
    splat,
    store,
    where_less,
)


@njit  # type: ignore[misc]
def compute(rows, out):  # type: ignore[no-untyped-def]
    """Fills out [6, LANES] from rows [3, LANES]; returns whether a number of the first is below one of the second."""
    there, to = address(rows), address(out)
    a, b = load(there, 0), load(there, 1)
    store(to, 0, a + b)
    store(to, 1, a - b)
    store(to, 2, a * b)
    store(to, 3, where_less(a, b, a, splat(np.float32(-2.5))))
    store(to, 4, number(there, LANES + 3))
    store(to, 5, load(there, 2) * splat(rows[0, 1]))
    return any_less(a, b)


def test_operations_are_those_of_each_number() -> None:
    rows = np.random.default_rng(0).standard_normal((3, LANES)).astype(np.float32)
    rows[0, 2] = rows[1, 2]  # a number is not below its equal
    out = np.zeros((7, LANES), np.float32)
    assert compute(rows, out)
    a, b, c = rows
    where = np.where(a < b, a, np.float32(-2.5))
    want = np.stack([a + b, a - b, a * b, where, np.full(LANES, b[3]), c * a[1], np.zeros(LANES, np.float32)])
    assert (out == want).all()
    rows[0] = rows[1]
    assert not compute(rows, out)
    rows[0, LANES - 1] -= 1
    assert compute(rows, out)


@njit  # type: ignore[misc]
def take(small, rows, out):  # type: ignore[no-untyped-def]
    """Fills out [LANES] with the second row of small [2, LANES]; returns the least lane of the second of rows."""
    store(address(out), 0, load_small(address(small), 1))
    return least_lane(load(address(rows), 1))


def test_small_numbers_and_the_first_that_is_least() -> None:
    rng = np.random.default_rng(1)
    small = rng.integers(-128, 128, (2, LANES)).astype(np.int8)
    out = np.zeros(LANES, np.float32)
    for lane in range(LANES):
        rows = rng.standard_normal((2, LANES)).astype(np.float32)
        rows[1, lane:] = np.maximum(rows[1, lane:], 0)
        rows[1, lane] = rows[1, -1] = -9  # the last one is no less
        small[1, lane] = -128
        assert take(small, rows, out) == lane
        assert (out == small[1]).all()
