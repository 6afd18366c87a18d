"""Steps down a gradient, by the way they are taken. Nothing here waits for a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["sign", "lion", "adam"]

LION = (0.9, 0.99)
"""How much of the mean over steps counts in a step, and how much of it is kept; https://arxiv.org/abs/2302.06675."""


class Adam(torch.optim.Adam):
    """Adam whose variables go together where they have the same rate, which takes few kernels.

    Args:
        rates: variables, and the rate of each in the first step.
    """

    def __init__(self, rates: Sequence[tuple[Tensor, float]]) -> None:
        self.rates = list(dict.fromkeys(rate for _, rate in rates))
        super().__init__([{"params": [leaf for leaf, own in rates if own == rate]} for rate in self.rates])

    def take(self, share: float) -> None:
        """A step, at a share of the first step's rates."""
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.step()


def optimizer(name: Optimizer, rates: Sequence[tuple[Tensor, float]]) -> Callable[[float], None]:
    """A function that takes a step, given the share of the first step's rate, and forgets gradients.

    Args:
        name: `sign` moves every variable by its rate, against its gradient's sign; `lion` against the sign of a mean
            of this gradient and those before; `adam` is Adam.
        rates: variables, and the rate of each in the first step.
    """
    adam = Adam(rates) if name == "adam" else None
    means = [torch.zeros_like(leaf) for leaf, _ in rates] if name == "lion" else []

    @torch.no_grad()
    def step(share: float) -> None:
        if adam:
            adam.take(share)
        for i, (leaf, rate) in enumerate(rates):
            if name == "sign" and leaf.is_cuda and leaf.is_contiguous() and leaf.grad is not None:
                from qtool.numerics.grids import cuda_soft

                cuda_soft.descend_sign(leaf, leaf.grad, rate * share)
            elif not adam and leaf.grad is not None:
                way = leaf.grad
                if means:
                    way = torch.lerp(leaf.grad, means[i], LION[0])
                    means[i].lerp_(leaf.grad, 1 - LION[1])
                leaf.sub_(way.sign_(), alpha=rate * share)
            leaf.grad = None

    return step
