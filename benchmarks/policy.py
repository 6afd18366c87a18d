"""A policy that learns which layer gets how many bits, in the manner of RAMP (https://arxiv.org/abs/2603.17891).

Layer after layer it reads eleven numbers (what RAMP's state is made of: statistics of inputs and of weights, place and
shape, and what the layer before got) and draws bits per weight; all are raised or lowered together until the file is
as large as the budget allows, and the reward is minus the logarithm of the plan's divergence. RAMP learns by soft
actor-critic over hundreds of measured plans; this one by REINFORCE (https://doi.org/10.1007/BF00992696) with the mean
of a batch as baseline, and where costs of layers are known it practises on their sums, which take no time, before.

Shape letters: B plans of a batch, F features of a layer, G decisions, J options of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qtool.allocate.fit import Chosen
from qtool.allocate.knapsack import total
from qtool.pipeline.allocator import Allocator

Floats = NDArray[np.float64]
BATCH = 4
"""Plans between two changes of the policy."""
PRACTICE = 2000
"""Plans that are judged by sums of costs, where these are known."""
HIDDEN, RATE, NOISE = 32, 1e-2, 0.5
"""Units between features and bits, Adam's rate, and the standard deviation of what is drawn, in bits, at first."""
STEPS = 40
"""Of the search for what all bits are raised or lowered by."""
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")


class Policy(nn.Module):
    """Bits per weight of every decision, drawn one after the other.

    Args:
        features: float32 [G, F].
        middle: bits that it begins with.
    """

    def __init__(self, features: Tensor, middle: float) -> None:
        super().__init__()
        self.features, self.middle, self.draw = features, middle, torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(features.shape[1] + 1, HIDDEN), nn.Linear(HIDDEN, 1)
        nn.init.normal_(self.first.weight, std=features.shape[1] ** -0.5, generator=self.draw)
        for zero in (self.first.bias, self.last.weight, self.last.bias):
            nn.init.zeros_(zero)
        self.noise = nn.Parameter(torch.tensor(math.log(NOISE)))

    def forward(self, count: int, drawn: bool = True) -> tuple[Tensor, Tensor]:
        """Bits, float32 [B, G], and the logarithm of their likelihood, [B]; not drawn: the most likely ones."""
        before, bits, likelihood = torch.zeros(count, 1), [], torch.zeros(count)
        for row in self.features:
            mean = self.last(torch.tanh(self.first(torch.cat([row.expand(count, -1), before], 1))))
            noise = torch.randn(count, 1, generator=self.draw) if drawn else torch.zeros(count, 1)
            action = (mean + self.noise.exp() * noise).detach()
            likelihood = likelihood - (((action - mean) / self.noise.exp()).square() / 2 + self.noise).sum(1)
            bits.append(action + self.middle)
            before = action
        return torch.cat(bits, 1), likelihood


class Learner:
    """Learns by plans and what they are worth.

    Args:
        policy: what learns.
        bits: of each option of each decision, float64 [J].
        sizes: bytes of the same, int64 [J].
    """

    def __init__(self, policy: Policy, bits: Sequence[Floats], sizes: Sequence[NDArray[np.int64]]) -> None:
        self.policy, most = policy, max(map(len, bits))
        self.bits = np.stack([np.pad(b, (0, most - len(b)), constant_values=np.inf) for b in bits])
        self.sizes = np.stack([np.pad(size, (0, most - len(size))) for size in sizes])
        self.adam = torch.optim.Adam(policy.parameters(), lr=RATE)

    def plan(self, wanted: Floats, room: int) -> Chosen:
        """The options next to some bits, float64 [G], all raised or lowered alike as far as `room` bytes allow."""
        known = self.bits[np.isfinite(self.bits)]
        high = float(max(known.max() - wanted.min(), wanted.max() - known.min()))
        low = -high
        for _ in range(STEPS):
            middle = (low + high) / 2
            near = self.nearest(wanted + middle)
            fits = np.take_along_axis(self.sizes, near[:, None], 1).sum() <= room
            low, high = (middle, high) if fits else (low, middle)
        return tuple(self.nearest(wanted + low).tolist())

    def nearest(self, wanted: Floats) -> NDArray[np.int64]:
        """The option of each decision that has the nearest bits, int64 [G]."""
        near: NDArray[np.int64] = np.abs(self.bits - wanted[:, None]).argmin(1)
        return near

    def learn(self, plans: int, make: Callable[[Floats], Chosen], loss: Callable[[Chosen], float]) -> None:
        """Some batches.

        Args:
            plans: how many to judge.
            make: a plan of bits, float64 [G].
            loss: what is to become small, above 0.
        """
        for _ in range(plans // BATCH):
            bits, likelihood = self.policy(BATCH)
            worth = torch.tensor([-math.log(loss(make(row))) for row in bits.double().numpy()])
            advantage = (worth - worth.mean()) / (worth.std() + 1e-6)
            self.adam.zero_grad()
            (-(advantage * likelihood).mean() / len(self.bits)).backward()
            self.adam.step()

    def settled(self) -> Floats:
        """The most likely bits, float64 [G]."""
        with torch.no_grad():
            bits: Floats = self.policy(1, drawn=False)[0][0].double().numpy()
        return bits


def learned(of: Allocator, plans: int, practice: int) -> Chosen:
    """The best plan that a policy came to.

    Args:
        of: measures plans, and knows what options cost.
        plans: how many it measures.
        practice: plans that it judges by sums of costs before.
    """
    assert of.limit is not None
    limit = of.limit
    shapes = [sum(math.prod(p.module.shape) for p in decision.options[0]) for decision in of.open]
    bits = [8.0 * sizes / weights for sizes, weights in zip(of.bytes, shapes, strict=True)]
    learner = Learner(Policy(features(of), 8 * limit / sum(shapes)), bits, of.bytes)
    least = tuple(int(sizes.argmin()) for sizes in of.bytes)
    beside = of.size(least) - sum(int(sizes.min()) for sizes in of.bytes)
    measured: dict[Chosen, float] = {}

    def roughly(wanted: Floats) -> Chosen:
        return learner.plan(wanted, limit - beside)

    def exactly(wanted: Floats) -> Chosen:
        room = limit - beside
        while (excess := of.size(chosen := learner.plan(wanted, room)) - limit) > 0:
            room -= excess
        return chosen

    def divergence(chosen: Chosen) -> float:
        measured[chosen] = of.measure(chosen).mean
        return measured[chosen]

    learner.learn(practice, roughly, lambda chosen: total(of.groups, chosen))
    divergence(exactly(learner.settled()))
    learner.learn(plans - 2, exactly, divergence)
    divergence(exactly(learner.settled()))
    return min(measured, key=lambda chosen: measured[chosen])


def features(of: Allocator) -> Tensor:
    """What the policy reads of each decision beside what it gave the one before, of the first module: [G, F]."""
    assert of.scores.found is not None
    importance, checkpoint, rows = of.scores.found.known[0], of.job.checkpoint, []
    depth = max((p.module.block or 0) for d in of.open for p in d.options[0]) or 1
    for decision in of.open:
        module = decision.options[0][0].module
        w, x = checkpoint.tensor(f"{module.name}.weight").float(), importance.get(module.reads)
        spread, square = float(w.std()), w.square().mean()
        inputs = [0.0, 0.0] if x is None else [float(x.mean().log()), float((x.max() / x.mean()).log())]
        weights = [math.log(spread), float((w.abs().max() / spread).log()), float((w.pow(4).mean() / square**2).log())]
        place = [(module.block or 0) / depth, *map(math.log, module.shape)]
        rows.append([*inputs, *weights, *place, float(module.role in ATTENTION), float(module.role in FEED_FORWARD)])
    found = torch.tensor(rows)
    return (found - found.mean(0)) / (found.std(0) + 1e-6)
