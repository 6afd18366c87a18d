"""The smallest plan that takes a model no further than allowed, found with few measurements."""

from __future__ import annotations

from qtool.allocate.fit import Chosen, matrices
from qtool.allocate.knapsack import least_cost, total
from qtool.errors import PlanError
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.trial import NORMAL

NEAR = 1.005
"""Ratio of sizes at which the search ends."""
MEASURED = 8
"""Plans that it measures at most."""


def small_enough(of: Allocator, most: float) -> Chosen:
    """The smallest choice whose divergence is no larger, upper end of its confidence interval included.

    The ratio of what was measured to what scores promise changes slowly, so that each measurement says which size
    to measure next.

    Args:
        of: knows what options cost, and measures.
        most: nats per token.

    Raises:
        PlanError: the best choice diverges further.
    """
    best = tuple(int(g.costs.argmin()) for g in of.groups)
    if (found := of.measure(best)).upper > most:
        missed = f"wanted a KL divergence of at most {most:g}, found {found.mean:.3g} + {NORMAL * found.error:.2g}"
        hint = "allow more, add larger formats to budget.formats, or hold out more samples"
        raise PlanError([f"budget: {missed} with the best formats; {hint}"], f"recipe {of.job.plan.recipe.name}")
    good, low, latest = best, sum(int(g.sizes.min()) for g in of.groups), (best, found)
    for _ in range(MEASURED - 1):
        chosen, divergence = latest
        promised = total(of.groups, chosen) * most / divergence.upper
        space = min(max(room(of, promised), low), matrices(of.groups, good))
        if matrices(of.groups, good) <= low * NEAR:
            break
        answer = least_cost(of.groups, space)
        assert answer is not None
        if answer.chosen in of.tried:
            answer = least_cost(of.groups, (low + matrices(of.groups, good)) // 2)
            assert answer is not None
            if answer.chosen in of.tried:
                break
        latest = answer.chosen, of.measure(answer.chosen)
        if latest[1].upper <= most:
            good = answer.chosen
        else:
            low = max(low, matrices(of.groups, answer.chosen))
    return good


def room(of: Allocator, cost: float) -> int:
    """Bytes of matrices with which a choice costs no more, as far as scores go."""
    low, high = (sum(int(pick(g.sizes)) for g in of.groups) for pick in (min, max))
    while high > low * NEAR:
        middle = (low + high) // 2
        answer = least_cost(of.groups, middle)
        if answer is not None and answer.cost <= cost:
            high = middle
        else:
            low = middle
    return high
