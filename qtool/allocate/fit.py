"""The choice that costs least among those whose file is no larger than a number of bytes.

Sizes of matrices add up, what stands around them (headers, tables, padding) nearly does: the solver is given the room
that is left for matrices, and where the file that comes of it is too large, that much less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qtool.allocate.knapsack import Group, least_cost

Chosen = tuple[int, ...]
"""An option of each group."""


def smallest(groups: Sequence[Group]) -> Chosen:
    """The smallest option of each group, of equal ones the cheapest."""
    return tuple(int(np.lexsort((g.costs, g.sizes))[0]) for g in groups)


def fit(groups: Sequence[Group], limit: int, size: Callable[[Chosen], int]) -> Chosen | None:
    """The choice that costs least; None: even the smallest is too large.

    Args:
        groups: options.
        limit: bytes that the file may have.
        size: bytes of the file of a choice, exactly.
    """
    least = smallest(groups)
    beside = size(least) - matrices(groups, least)
    if size(least) > limit:
        return None
    room = limit - beside
    while (answer := least_cost(groups, room)) is not None:
        if (excess := size(answer.chosen) - limit) <= 0:
            return polished(groups, limit, size, answer.chosen, beside)
        room -= excess
    return polished(groups, limit, size, least, beside)


def polished(groups: Sequence[Group], limit: int, size: Callable[[Chosen], int], chosen: Chosen, beside: int) -> Chosen:
    """A choice with single options exchanged for cheaper ones, as long as some fit.

    That is only possible where what stands around the matrices is smaller than the solver was told.

    Args:
        groups: options.
        limit: see `fit`.
        size: see `fit`.
        chosen: fits.
        beside: bytes around the matrices that the solver was told.
    """
    while True:
        spare = limit - size(chosen) + abs(size(chosen) - matrices(groups, chosen) - beside)
        swaps = sorted(
            (float(g.costs[j] - g.costs[c]), i, j)
            for i, (g, c) in enumerate(zip(groups, chosen, strict=True))
            for j in range(len(g.sizes))
            if g.costs[j] < g.costs[c] and g.sizes[j] - g.sizes[c] <= spare
        )
        others = ((*chosen[:i], j, *chosen[i + 1 :]) for _, i, j in swaps)
        found = next((other for other in others if size(other) <= limit), None)
        if found is None:
            return chosen
        chosen = found


def matrices(groups: Sequence[Group], chosen: Chosen) -> int:
    """Bytes of the matrices of a choice."""
    return sum(int(g.sizes[j]) for g, j in zip(groups, chosen, strict=True))
