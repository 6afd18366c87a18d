"""Scales and minima that are multiples of steps, moved along with codes, against plain sums in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from qtool.numerics.solving.settle_multiples import Multiples, settle_multiples


def problem(rows: int, supers: int, groups: int, width: int, minima: bool):  # type: ignore[no-untyped-def]
    """(weights, Gram matrix, levels, parameters, codes), of which none is the best for the others."""
    generator = torch.Generator().manual_seed(rows + width)
    k = supers * groups * width
    x = torch.randn(3 * k, k, generator=generator) @ (torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5)
    low, top = (0, 15) if minima else (-8, 7)
    levels = torch.arange(0.0, 8.0) if minima else torch.arange(-4.0, 4.0)
    a = torch.randint(1, top + 1, (rows, supers * groups), generator=generator).float()
    b = torch.randint(0, top + 1, (rows, supers * groups), generator=generator).float()
    d, dmin = (torch.rand(2, rows, supers, generator=generator) * 0.02 + 0.01).half().float()
    params = Multiples(d, dmin if minima else d, a, b if minima else a, minima, (low, top))
    codes = torch.randint(0, len(levels), (rows, k), generator=generator).to(torch.uint8)
    w = decoded(params, levels, codes) + 0.05 * torch.randn(rows, k, generator=generator)
    return w.float(), x.T @ x, levels, params, codes


def decoded(params: Multiples, levels: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """w_hat, float64 [N, K], column by column."""
    n, k = codes.shape
    out = torch.empty(n, k, dtype=torch.float64)
    for j in range(k):
        g, s = j * params.a.shape[1] // k, j * params.d.shape[1] // k
        out[:, j] = params.d[:, s].double() * params.a[:, g] * levels[codes[:, j].long()]
        if params.minima:
            out[:, j] -= params.dmin[:, s].double() * params.b[:, g]
    return out


def objective(w, gram, params, levels, codes):  # type: ignore[no-untyped-def]
    """tr(D H D^T) row by row, float64 [N]."""
    rest = w.double() - decoded(params, levels, codes)
    return ((rest @ gram.double()) * rest).sum(1)


@pytest.mark.parametrize(("minima", "most"), [(True, 0.39), (False, 0.27)])
def test_every_move_lowers_the_error_and_the_pull_is_what_is_left(minima, most):
    w, gram, levels, params, codes = problem(40, 3, 4, 8, minima)
    rest = (w.double() - decoded(params, levels, codes)).float()
    found, better, left = settle_multiples(gram, levels, params, codes, rest)
    before, after = (objective(w, gram, *each) for each in ((params, levels, codes), (found, levels, better)))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < most * before.sum()
    pull = (w.double() - decoded(found, levels, better)) @ gram.double()
    torch.testing.assert_close(left.double(), pull, rtol=0, atol=1e-5 * float((rest @ gram).abs().max()))
    steps, multiples = [found.d, *([found.dmin] if minima else [])], [found.a, *([found.b] if minima else [])]
    assert all(torch.equal(step, step.half().float()) for step in steps)
    for each in multiples:
        assert torch.equal(each, each.round())
        assert params.limits[0] <= each.min() and each.max() <= params.limits[1]
    assert not torch.equal(found.d, params.d) and not torch.equal(found.a, params.a)


@pytest.mark.parametrize("minima", [True, False])
def test_one_group_gets_what_no_other_pair_beats(minima):
    w, gram, levels, params, codes = problem(12, 1, 1, 8, minima)
    rest = (w.double() - decoded(params, levels, codes)).float()
    found, better, _ = settle_multiples(gram, levels, params, codes, rest)
    after = objective(w, gram, found, levels, better)
    low, top = params.limits
    for a, b in itertools.product(range(low, top + 1), range(low, top + 1) if minima else [0]):
        other = params._replace(a=torch.full_like(params.a, a), b=torch.full_like(params.b, b))
        assert (after <= objective(w, gram, other, levels, codes) * (1 + 1e-5)).all(), (a, b)


def test_what_is_given_stays_as_it_is():
    w, gram, levels, params, codes = problem(5, 2, 2, 4, True)
    rest = w - decoded(params, levels, codes).float()
    copies = [t.clone() for t in (*params[:4], codes, rest)]
    settle_multiples(gram, levels, params, codes, rest)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*params[:4], codes, rest), strict=True))
