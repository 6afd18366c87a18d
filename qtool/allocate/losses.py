"""What rounding a matrix costs, by what it does to the loss of a model: ways to say so, of which a budget names one.

All are about a linear layer y = x W^T whose loss has squared gradients s by output and token. With outputs taken to
have nothing to do with each other, the curvature of the loss in the weights of a row n is sum_r s[r, n] x_r x_r^T. The
trace that HAWQ-V2 estimates by Hutchinson's method, and the largest eigenvalue that HAWQ finds by power iteration, are
those of this matrix; its trace is a plain sum.

Shape letters: R tokens that a module reads, K inputs, M rows that stand for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 12
"""Of power iteration; eigenvalues lie far apart, and a few per cent change no plan."""


class Rounding(NamedTuple):
    """A matrix, the same rounded, and what reads it.

    Attributes:
        x: inputs, [R, K].
        behind: the same as they are rounded; None: they are not.
        w: float32 [M, K].
        w_hat: the same rounded.
        squares: squared gradients of outputs, [R, M].
        weights: rows that each row stands for, float64 [M].
    """

    x: Tensor
    behind: Tensor | None
    w: Tensor
    w_hat: Tensor
    squares: Tensor
    weights: Tensor

    def errors(self) -> Tensor:
        """What happens to outputs, float32 [R, M]. Products are of differences, so that a narrow type says enough."""
        x = self.x
        error = (x if self.behind is None else self.behind) @ (self.w - self.w_hat).to(x.dtype).T
        if self.behind is not None:
            error += (x - self.behind) @ self.w.to(x.dtype).T
        return error.float()

    def summed(self, rows: Tensor) -> float:
        """Of all rows together, by those that stand for them: [M]."""
        return float(rows.double().cpu() @ self.weights)


def second_order(r: Rounding) -> float:
    """Half the squared errors of outputs times squared gradients: the KL divergence to second order, nats."""
    return r.summed(r.errors().square_().mul_(r.squares).sum(0)) / 2


def first_order(r: Rounding) -> float:
    """Errors of outputs times gradients, absolute: how much each token's loss may change, as AutoScheme adds up."""
    return r.summed(r.errors().abs_().mul_(r.squares.float().sqrt()).sum(0))


def trace(r: Rounding) -> float:
    """Squared errors of weights times the mean of the curvature's diagonal (HAWQ-V2, https://arxiv.org/abs/1911.03852)."""
    whole = r.summed(r.x.float().square().sum(1) @ r.squares.float())
    numbers = float(r.weights.sum()) * r.w.shape[1]
    return whole / numbers * r.summed((r.w - r.w_hat).square().sum(1)) / 2


def eigenvalue(r: Rounding) -> float:
    """Squared errors of weights times the curvature's largest eigenvalue (HAWQ, https://arxiv.org/abs/1905.03696)."""
    x, squares = r.x.float(), r.squares.float()
    v = torch.ones(r.w.shape, device=x.device)
    largest = torch.zeros(len(v), device=x.device)
    for _ in range(STEPS):
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
        v = (x @ v.T).mul_(squares).T @ x
        largest = v.norm(dim=1)
    return float(largest.max()) * r.summed((r.w - r.w_hat).square().sum(1)) / 2


LOSSES: dict[str, Callable[[Rounding], float]] = {
    "second-order": second_order,
    "first-order": first_order,
    "trace": trace,
    "eigenvalue": eigenvalue,
}
