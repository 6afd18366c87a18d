"""The multiple-choice knapsack: one option per group, least total cost, total size within a capacity. Exact.

Dynamic programming over (size, cost) states of which none is beaten in both, https://doi.org/10.1287/mnsc.15.9.494,
pruned by the Lagrangian bound: with a price per byte, no completion of a state costs less than the cheapest options of
all other groups. The price is that of the relaxation in which options may be mixed, whose answer rounded down is the
solution to beat, https://doi.org/10.1016/0377-2217(94)00206-3. What decides last is what the price leaves open.

Shape letters: G groups, J options of one, S states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Sizes = NDArray[np.int64]
Costs = NDArray[np.float64]

STATES = 1 << 20
"""Most states that are kept at a time; beyond it the most promising are, and the answer is only near the best."""
SLACK = 1e-12
"""Of costs, relative: what rounding of sums may make of equal ones."""


class Group(NamedTuple):
    """Options of which exactly one is taken: sizes int64 [J], costs float64 [J]."""

    sizes: Sizes
    costs: Costs


class Answer(NamedTuple):
    """What was found.

    Attributes:
        chosen: option of each group.
        cost: of all of them.
        bound: no choice within the capacity costs less.
    """

    chosen: tuple[int, ...]
    cost: float
    bound: float


def least_cost(groups: Sequence[Group], capacity: int) -> Answer | None:
    """The options that cost least and are no larger than `capacity` together; None: the smallest are larger."""
    if sum(int(g.sizes.min()) for g in groups) > capacity:
        return None
    kept = [undominated(g) for g in groups]
    price, begun = relaxed([Group(g.sizes[k], g.costs[k]) for g, k in zip(groups, kept, strict=True)], capacity)
    best = tuple(int(k[j]) for k, j in zip(kept, begun, strict=True))
    best_cost = total(groups, best)
    search = Search(groups, kept, price, capacity, best_cost)
    if (found := search.run()) is not None:
        best, best_cost = found, total(groups, found)
    bound = best_cost if search.exact else min(best_cost, search.floor)
    return Answer(best, best_cost, bound)


def total(groups: Sequence[Group], chosen: Sequence[int]) -> float:
    """Cost of a choice."""
    return math.fsum(g.costs[j] for g, j in zip(groups, chosen, strict=True))


def undominated(group: Group) -> Sizes:
    """Options, by size, that are cheaper than all that are no larger: int64 indices."""
    order = np.lexsort((group.costs, group.sizes))
    costs = group.costs[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(costs)[:-1]])
    return order[costs < before]


def relaxed(groups: Sequence[Group], capacity: int) -> tuple[float, list[int]]:
    """The price per byte of the relaxation, and a choice that fits.

    Args:
        groups: options by size, each cheaper than the one before.
        capacity: at least the size of all first options.
    """
    steps = sorted(step for i, g in enumerate(groups) for step in hull(i, g))
    chosen, room, price = [0] * len(groups), capacity - sum(int(g.sizes[0]) for g in groups), 0.0
    for slope, i, j in steps:
        more = int(groups[i].sizes[j] - groups[i].sizes[chosen[i]])
        if more <= room:
            chosen[i], room = j, room - more
        elif price == 0.0:
            price = -slope  # the step that is taken in part
    return price, chosen


def hull(index: int, group: Group) -> Iterator[tuple[float, int, int]]:
    """Steps along the lower convex hull: (cost per byte, negative and rising; group; option that is reached)."""
    corners = [0]
    for j in range(1, len(group.sizes)):
        while len(corners) > 1 and slope(group, corners[-2], corners[-1]) >= slope(group, corners[-1], j):
            corners.pop()
        corners.append(j)
    yield from ((slope(group, a, b), index, b) for a, b in pairwise(corners))


def slope(group: Group, a: int, b: int) -> float:
    """Cost per byte from one option to a larger one."""
    return float((group.costs[b] - group.costs[a]) / (group.sizes[b] - group.sizes[a]))


class Search:
    """States over groups, from the one whose decision the price leaves open least.

    Args:
        groups: all options.
        kept: those that count, of each group.
        price: per byte.
        capacity: of all.
        upper: cost of a known solution.

    Attributes:
        exact: whether no state had to be dropped.
        floor: no solution costs less.
    """

    def __init__(
        self, groups: Sequence[Group], kept: Sequence[Sizes], price: float, capacity: int, upper: float
    ) -> None:
        self.groups, self.kept, self.price, self.capacity, self.upper = groups, kept, price, capacity, upper
        self.exact = True
        priced = [np.sort(g.costs[k] + price * g.sizes[k]) for g, k in zip(groups, kept, strict=True)]
        self.least = [float(p[0]) for p in priced]
        doubt = [float(p[1] - p[0]) if len(p) > 1 else np.inf for p in priced]
        self.order = sorted(range(len(groups)), key=lambda i: -doubt[i])
        self.floor = sum(self.least) - price * capacity

    def run(self) -> tuple[int, ...] | None:
        """The best choice; None if none is better than the known one."""
        sizes, costs = np.zeros(1, np.int64), np.zeros(1)
        rest, trail = sum(self.least), list[tuple[NDArray[np.int64], NDArray[np.int64]]]()
        smallest = sum(int(self.groups[i].sizes.min()) for i in self.order)
        for i in self.order:
            rest, smallest = rest - self.least[i], smallest - int(self.groups[i].sizes.min())
            own = self.kept[i]
            all_sizes = (sizes[:, None] + self.groups[i].sizes[own]).ravel()
            all_costs = (costs[:, None] + self.groups[i].costs[own]).ravel()
            keep = self.promising(all_sizes, all_costs, rest, smallest)
            if not len(keep):
                return None
            sizes, costs = all_sizes[keep], all_costs[keep]
            trail.append((keep // len(own), own[keep % len(own)]))
        state, chosen = int(costs.argmin()), dict[int, int]()
        if costs[state] >= self.upper:
            return None
        for i, (before, option) in zip(reversed(self.order), reversed(trail), strict=True):
            chosen[i], state = int(option[state]), int(before[state])
        return tuple(chosen[i] for i in range(len(self.groups)))

    def promising(self, sizes: Sizes, costs: Costs, rest: float, smallest: int) -> NDArray[np.int64]:
        """States, by size, that another one does not beat and that may lead to something better than what is known.

        Args:
            sizes: of states, [S].
            costs: theirs.
            rest: least cost of the groups to come, priced.
            smallest: least size of these.
        """
        bounds = costs + rest - self.price * (self.capacity - sizes)
        slack = SLACK * (abs(self.upper) + self.price * self.capacity)
        hopeful = np.flatnonzero((sizes + smallest <= self.capacity) & (bounds <= self.upper + slack))
        order = hopeful[np.lexsort((costs[hopeful], sizes[hopeful]))]
        ordered = costs[order]
        before = np.concatenate([[np.inf], np.minimum.accumulate(ordered)[:-1]]) if len(order) else ordered
        order = order[ordered < before]
        if len(order) > STATES:
            self.exact = False
            order = np.sort(order[np.argpartition(bounds[order], STATES)[:STATES]])
            order = order[np.argsort(sizes[order], kind="stable")]
        return order
