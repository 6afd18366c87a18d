"""Plans of the same size that would be best if costs of one role of layers were wrong, measured.

Costs are sums over layers, to second order and of few tokens, and are wrong in the same way for layers of a kind:
what the query projections of all blocks cost together may be half of what is said, or twice. Where that changes the
plan, the other plan is measured too. Measuring candidates instead of trusting scores is what EXL3 does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from qtool.allocate.fit import Chosen
from qtool.allocate.knapsack import Group
from qtool.pipeline.allocator import Allocator

WRONG = 2.0
"""Factor by which costs of a role may be wrong."""


def swapped(of: Allocator, chosen: Chosen, limit: int) -> Chosen:
    """The best of a plan and of others of its size, each the plan that follows if a role costs more or less.

    Another plan is taken if it is better by more than the standard error of the difference on held-out samples; the
    next ones are then tried on top of it.

    Args:
        of: knows what options cost, and measures.
        chosen: what costs say.
        limit: bytes.
    """
    factors, left = dict.fromkeys(roles(of), 1.0), of.budget.swaps
    for role, factor in doubts(of, chosen):
        if not left:
            break
        tried = {**factors, role: factors[role] * factor}
        other = of.solved(scaled(of, tried), limit)
        if other is None or other in of.tried:
            continue
        left -= 1
        now, then = of.measure(chosen), of.measure(other)
        if now.mean - then.mean > now.less(then):
            chosen, factors = other, tried
    return chosen


def roles(of: Allocator) -> list[str]:
    """The role of each decision: that of its first module."""
    return [decision.options[0][0].module.role for decision in of.open]


def doubts(of: Allocator, chosen: Chosen) -> Iterator[tuple[str, float]]:
    """Roles, those first that cost most, each with the factors that its costs may need."""
    shares: dict[str, float] = defaultdict(float)
    for role, group, j in zip(roles(of), of.groups, chosen, strict=True):
        shares[role] += float(group.costs[j])
    for role in sorted(shares, key=lambda name: -shares[name]):
        yield role, WRONG
        yield role, 1 / WRONG


def scaled(of: Allocator, factors: dict[str, float]) -> list[Group]:
    """All groups, with costs times the factors of their roles."""
    return [Group(g.sizes, g.costs * factors[role]) for g, role in zip(of.groups, roles(of), strict=True)]
