"""Costs of rounding against loops, and the curvature's trace and eigenvalues against the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.allocate.losses import LOSSES, Rounding

R, K, M = 7, 5, 3


@pytest.fixture(params=[False, True], ids=["inputs", "rounded-inputs"])
def rounding(request):
    draw = torch.Generator().manual_seed(3)
    x, w = torch.randn(R, K, generator=draw), torch.randn(M, K, generator=draw)
    behind = (x * 4).round() / 4 if request.param else None
    weights = torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64)
    return Rounding(x, behind, w, (w * 2).round() / 2, torch.rand(R, M, generator=draw) ** 4, weights)


def test_errors_of_outputs(rounding):
    r, behind = rounding, rounding.x if rounding.behind is None else rounding.behind
    second = first = 0.0
    for n in range(M):
        for t in range(R):
            error = sum(float(r.w[n, k] * r.x[t, k] - r.w_hat[n, k] * behind[t, k]) for k in range(K))
            second += float(r.weights[n]) * float(r.squares[t, n]) * error**2 / 2
            first += float(r.weights[n]) * math.sqrt(float(r.squares[t, n])) * abs(error)
    assert LOSSES["second-order"](r) == pytest.approx(second, rel=1e-5)
    assert LOSSES["first-order"](r) == pytest.approx(first, rel=1e-5)


def test_curvature(rounding):
    """Of each row a K x K matrix: its trace by its diagonal, its eigenvalues by LAPACK."""
    r = rounding
    curvatures = torch.einsum("tn,tj,tk->njk", r.squares.double(), r.x.double(), r.x.double())
    moved = float(((r.w - r.w_hat).double().square().sum(1) * r.weights).sum())
    diagonal = sum(float(w * c.trace()) for w, c in zip(r.weights, curvatures, strict=True))
    mean = diagonal / (float(r.weights.sum()) * K)
    assert LOSSES["trace"](r) == pytest.approx(mean * moved / 2, rel=1e-5)
    largest = max(float(torch.linalg.eigvalsh(c)[-1]) for c in curvatures)
    assert LOSSES["eigenvalue"](r) == pytest.approx(largest * moved / 2, rel=0.02)
    assert largest > 2 * mean


def test_hutchinson_finds_the_trace(rounding):
    """Random signs z: the mean of z' H z is the trace, which is why none are drawn."""
    r, draw = rounding, torch.Generator().manual_seed(0)
    z = torch.randint(0, 2, (4000, M, K), generator=draw).float() * 2 - 1
    seen = torch.einsum("tk,dnk->dtn", r.x, z).square() * r.squares * r.weights.float()
    moved = float(((r.w - r.w_hat).double().square().sum(1) * r.weights).sum())
    found = float(seen.sum((1, 2)).mean()) / (float(r.weights.sum()) * K) * moved / 2
    assert LOSSES["trace"](r) == pytest.approx(found, rel=0.05)
