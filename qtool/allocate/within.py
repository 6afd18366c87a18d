"""The cheapest choice that keeps several limits at once: bytes, bit operations, time.

Each limit beside bytes gets a price per unit that is added to costs, the lowest with which the choice keeps it
(Lagrangian relaxation, https://doi.org/10.1287/mnsc.27.1.1); with the price found, what is left is the knapsack of
`qtool.allocate.knapsack`, which is solved exactly. Choices that no price leads to are looked for by exchanging single
options afterwards. HAWQ-V3 (https://arxiv.org/abs/2011.10680) solves the same by integer programming.

Shape letters: J options of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qtool.allocate.fit import Chosen, fit
from qtool.allocate.knapsack import Group, total

STEPS = 12
"""Of the search for a price."""
DOUBLINGS = 60
NEAR = 1 + 1e-9
"""What rounding of sums may add to a limit."""


class Constraint(NamedTuple):
    """Something else than bytes that adds up over groups.

    Attributes:
        name: in words.
        amounts: of the options of each group, float64 [J].
        most: that all may have together.
        unit: behind numbers.
    """

    name: str
    amounts: Sequence[NDArray[np.float64]]
    most: float
    unit: str = ""

    def of(self, chosen: Chosen) -> float:
        """What a choice has."""
        return float(sum(amounts[j] for amounts, j in zip(self.amounts, chosen, strict=True)))

    def keeps(self, chosen: Chosen) -> bool:
        """Whether a choice has no more."""
        return self.of(chosen) <= self.most * NEAR

    def least(self) -> float:
        """Less than which no choice has."""
        return float(sum(amounts.min() for amounts in self.amounts))


def fit_within(
    groups: Sequence[Group], limit: int, size: Callable[[Chosen], int], constraints: Sequence[Constraint]
) -> Chosen | None:
    """The choice that costs least, or nearly so, among those that keep all limits; None: none was found.

    Args:
        groups: options.
        limit: bytes that the file may have.
        size: bytes of the file of a choice, exactly.
        constraints: the other limits.
    """
    chosen = priced(groups, limit, size, constraints)
    return chosen if chosen is None or not constraints else exchanged(groups, limit, size, constraints, chosen)


def priced(
    groups: Sequence[Group], limit: int, size: Callable[[Chosen], int], constraints: Sequence[Constraint]
) -> Chosen | None:
    """The best choice that prices lead to; see `fit_within`."""
    if not constraints:
        return fit(groups, limit, size)
    *others, last = constraints

    def at(price: float) -> Chosen | None:
        costs = [Group(g.sizes, g.costs + price * a) for g, a in zip(groups, last.amounts, strict=True)]
        return priced(costs, limit, size, others)

    best = at(0.0)
    if best is None or last.keeps(best):
        return best
    low, high = 0.0, max(sum(float(np.ptp(g.costs)) for g in groups) / last.of(best), 1e-30) / len(groups)
    for _ in range(DOUBLINGS):
        best = at(high)
        if best is None or last.keeps(best):
            break
        low, high = high, 2 * high
    if best is None or not last.keeps(best):
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = at(middle)
        if found is not None and last.keeps(found):
            high, best = middle, min(best, found, key=lambda c: total(groups, c))
        else:
            low = middle
    return best


def exchanged(
    groups: Sequence[Group],
    limit: int,
    size: Callable[[Chosen], int],
    constraints: Sequence[Constraint],
    chosen: Chosen,
) -> Chosen:
    """A choice with single options exchanged for cheaper ones, as long as some keep all limits."""
    while True:
        cheaper = sorted(
            (float(g.costs[j] - g.costs[c]), i, j)
            for i, (g, c) in enumerate(zip(groups, chosen, strict=True))
            for j in range(len(g.sizes))
            if g.costs[j] < g.costs[c]
        )
        others = ((*chosen[:i], j, *chosen[i + 1 :]) for _, i, j in cheaper)
        keeping = (other for other in others if all(c.keeps(other) for c in constraints))
        found = next((other for other in keeping if size(other) <= limit), None)
        if found is None:
            return chosen
        chosen = found
