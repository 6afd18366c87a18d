"""Several limits at once, against all choices that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qtool.allocate.knapsack import Group, total
from qtool.allocate.within import Constraint, fit_within


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_against_all_choices(count, seed):
    """Every answer keeps all limits, and few cost more than the best."""
    rng, excess = np.random.default_rng(seed), []
    groups = [Group(np.sort(rng.integers(10, 99, 4)), np.sort(rng.lognormal(0, 1.5, 4))[::-1].copy()) for _ in range(6)]
    amounts = [[rng.permutation(np.sort(rng.uniform(1, 9, 4))) for _ in groups] for _ in range(count)]
    every = np.array(list(itertools.product(range(4), repeat=6)))

    def sums(columns):
        return sum(np.asarray(column)[every[:, i]] for i, column in enumerate(columns))

    def size(chosen):
        return sum(int(g.sizes[j]) for g, j in zip(groups, chosen, strict=True)) + 100

    sizes, costs, used = sums([g.sizes for g in groups]) + 100, sums([g.costs for g in groups]), [*map(sums, amounts)]
    for _ in range(12):
        limit = int(rng.integers(sizes.min(), sizes.max()))
        most = [float(rng.uniform(u.min(), u.max())) for u in used]
        constraints = [Constraint("x", a, m) for a, m in zip(amounts, most, strict=True)]
        found = fit_within(groups, limit, size, constraints)
        good = (sizes <= limit) & np.all([u <= m for u, m in zip(used, most, strict=True)], axis=0)
        if found is None:
            excess.append(np.inf if good.any() else 1.0)
            continue
        assert size(found) <= limit
        assert all(c.keeps(found) for c in constraints)
        excess.append(total(groups, found) / costs[good].min())
    assert min(excess) >= 1 - 1e-9
    assert np.mean(np.array(excess) < 1.02) >= 0.7


def test_without_other_limits_it_is_exact():
    groups = [Group(np.array([1, 2]), np.array([3.0, 1.0])), Group(np.array([1, 3]), np.array([9.0, 1.0]))]
    assert fit_within(groups, 4, lambda c: 1 * (c[0] + 1) + (1, 3)[c[1]], ()) == (0, 1)


def test_what_a_choice_has():
    limit = Constraint("time", [np.array([1.0, 2.0]), np.array([3.0, 5.0])], 6.0)
    assert (limit.of((1, 0)), limit.least(), limit.keeps((0, 1)), limit.keeps((1, 1))) == (5.0, 4.0, True, False)
