"""Rivals of costs in benchmarks: they learn what to spend bytes on, and spend no more than they have."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.policy import Learner, Policy, learned
from benchmarks.scores import evolved
from qtool.allocate.knapsack import Group, least_cost, total
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.events import silent
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import prepare

BITS = np.array([2.5, 3.5, 4.5, 6.5])


def problem(decisions):
    """One of which a feature says what bits are worth."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(decisions, 3, generator=draw)
    weights = [256 * int(n) for n in torch.randint(1, 4, (decisions,), generator=draw)]
    worth = (2 * features[:, 0]).exp().tolist()
    groups = [Group((n * BITS / 8).astype(np.int64), n * w * 4.0**-BITS) for n, w in zip(weights, worth, strict=True)]
    return features, groups


def learner_of(features, groups):
    return Learner(Policy(features, 3.5), [BITS] * len(groups), [g.sizes for g in groups])


def test_a_policy_learns_from_costs():
    features, groups = problem(12)
    room = sum(int(g.sizes[1]) for g in groups)
    learner = learner_of(features, groups)

    def make(wanted):
        chosen = learner.plan(wanted, room)
        assert sum(int(g.sizes[j]) for g, j in zip(groups, chosen, strict=True)) <= room
        return chosen

    least = least_cost(groups, room).cost
    begun = total(groups, make(learner.settled()))
    learner.learn(400, make, lambda chosen: total(groups, chosen))
    came_to = total(groups, make(learner.settled()))
    assert came_to < least + 0.25 * (begun - least)


def test_bits_are_raised_as_far_as_they_fit():
    features, groups = problem(4)
    learner, wanted = learner_of(features, groups), np.array([2.6, 4.4, 3.1, 5.9])
    for room in range(sum(int(g.sizes[0]) for g in groups), sum(int(g.sizes[-1]) for g in groups), 211):
        chosen = learner.plan(wanted, room)
        shifted = [tuple(learner.nearest(wanted + shift).tolist()) for shift in np.linspace(-4, 4, 801)]
        fitting = [one for one in shifted if sum(int(g.sizes[j]) for g, j in zip(groups, one, strict=True)) <= room]
        assert chosen == fitting[-1]


def test_likelihoods_are_those_of_a_normal_distribution():
    features, _ = problem(5)
    policy = Policy(features, 3.5)
    with torch.no_grad():
        policy.last.weight.normal_(generator=torch.Generator().manual_seed(2))
        policy.noise.fill_(-1.2)
    bits, likelihood = policy(3)
    for row, found in zip(bits, likelihood, strict=True):
        before, wanted = 0.0, 0.0
        for action, own in zip(row - 3.5, features, strict=True):
            mean = policy.last(torch.tanh(policy.first(torch.cat([own, torch.tensor([before])])))).item()
            wanted += torch.distributions.Normal(mean, np.exp(-1.2)).log_prob(action).item() + np.log(2 * np.pi) / 2
            before = action.item()
        assert abs(found.item() - wanted) < 1e-4


def test_rivals_keep_the_budget_of_a_model(tiny_checkpoint, tmp_path):
    (tmp_path / "fit.yaml").write_text(
        """
recipe: 1
name: fit
calibration: {data: builtin, samples: 2, length: 32}
layers: [{match: "*", weights: q8_0}]
budget: {formats: [q4_0, q8_0], samples: 1, held_out: 2}
export: [{to: gguf}]
"""
    )
    job = prepare(str(tiny_checkpoint("llama")), str(tmp_path / "fit.yaml"), (), device="cpu")
    of = Allocator(job, {"base_model": "llama", "recipe_name": "fit"})
    ends = [of.size(tuple(int(pick(sizes)) for sizes in of.bytes)) for pick in (np.argmin, np.argmax)]
    of.budget = of.budget.model_copy(update={"size": sum(ends) // 2})
    of.score(*tokens_for(job), tmp_path / "scores", False, "", silent)
    begin = of.fitting(of.limit)
    for find in (lambda: evolved(of, begin, 5), lambda: learned(of, 6, 8)):
        of.tried.clear()
        chosen = find()
        assert chosen in of.tried
        assert 1 < len(of.tried) <= 6
        assert of.measure(chosen).mean == min(of.measure(one).mean for one in of.tried)
        assert all(of.size(one) <= of.limit for one in of.tried)
