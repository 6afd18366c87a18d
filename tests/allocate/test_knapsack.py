"""The solver against trying everything."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from qtool.allocate import knapsack
from qtool.allocate.knapsack import Group, least_cost, total


def random_groups(rng, count, convex, unit=1):
    groups = []
    for _ in range(count):
        options = int(rng.integers(1, 5))
        sizes = np.sort(rng.integers(1, 60, options)) * unit
        costs = rng.random(options)
        groups.append(Group(sizes, np.sort(costs)[::-1] / (sizes if convex else 1)))
    return groups


def tried(groups, capacity):
    """The least cost of all choices that fit; None if none does."""
    fits = [
        math.fsum(g.costs[j] for g, j in zip(groups, choice, strict=True))
        for choice in itertools.product(*(range(len(g.sizes)) for g in groups))
        if sum(g.sizes[j] for g, j in zip(groups, choice, strict=True)) <= capacity
    ]
    return min(fits, default=None)


@pytest.mark.parametrize("seed", range(300))
def test_nothing_that_fits_costs_less(seed):
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, int(rng.integers(1, 8)), seed % 2, 32 if seed % 3 else 1)
    low = sum(int(g.sizes.min()) for g in groups)
    high = sum(int(g.sizes.max()) for g in groups)
    for capacity in {low - 1, low, high, high + 7, *rng.integers(low, high + 1, 4).tolist()}:
        found, best = least_cost(groups, capacity), tried(groups, capacity)
        if best is None:
            assert found is None
            continue
        assert sum(int(g.sizes[j]) for g, j in zip(groups, found.chosen, strict=True)) <= capacity
        assert found.cost == pytest.approx(best, rel=1e-12, abs=1e-300)
        assert found.cost == total(groups, found.chosen)
        assert found.bound == found.cost


def test_equal_sizes_and_costs_that_do_not_fall():
    groups = [Group(np.array([4, 4, 8]), np.array([2.0, 1.0, 3.0])), Group(np.array([5, 1]), np.array([0.0, 0.0]))]
    assert least_cost(groups, 5).chosen == (1, 1)


def test_costs_that_differ_by_many_orders_of_magnitude():
    rng = np.random.default_rng(1)
    groups = [Group(g.sizes, g.costs * 10.0 ** -(3 * i)) for i, g in enumerate(random_groups(rng, 6, True))]
    capacity = sum(int(g.sizes.max()) for g in groups) * 2 // 3
    assert least_cost(groups, capacity).cost == pytest.approx(tried(groups, capacity), rel=1e-12)


def test_hundreds_of_layers_take_no_time():
    rng = np.random.default_rng(2)
    bits = np.array([2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5])
    groups = []
    for weights in rng.choice([2**20, 2**22, 11 * 2**20], 700):
        groups.append(Group((weights * bits / 8).astype(np.int64), rng.lognormal() * weights * 4.0**-bits))
    smallest, largest = (sum(int(pick(g.sizes)) for g in groups) for pick in (np.min, np.max))
    begin = time.process_time()
    for share in (0.1, 0.4, 0.8):
        capacity = int(smallest + share * (largest - smallest))
        found = least_cost(groups, capacity)
        assert capacity * 0.999 < sum(int(g.sizes[j]) for g, j in zip(groups, found.chosen, strict=True)) <= capacity
        assert found.bound == found.cost
    assert time.process_time() - begin < 20


def test_too_many_states_leave_a_bound(monkeypatch):
    monkeypatch.setattr(knapsack, "STATES", 2)
    rng = np.random.default_rng(5)
    gaps = []
    for _ in range(30):
        groups = random_groups(rng, 7, False)
        capacity = sum(int(g.sizes.min() + g.sizes.max()) for g in groups) // 2
        found = least_cost(groups, capacity)
        assert sum(int(g.sizes[j]) for g, j in zip(groups, found.chosen, strict=True)) <= capacity
        assert found.bound <= tried(groups, capacity) * (1 + 1e-12) <= found.cost * (1 + 2e-12)
        gaps.append(found.cost - found.bound)
    assert max(gaps) > 0
