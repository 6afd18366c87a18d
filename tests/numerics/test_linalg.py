"""The inverse factor against an inverse in float64."""

from __future__ import annotations

import pytest
import torch

from qtool.errors import NumericsError
from qtool.numerics.solving.linalg import inverse_factor, invert_lower, ridge


def gram(k: int) -> torch.Tensor:
    x = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(k))
    return x.T @ x


@pytest.mark.parametrize("wanted", [0.01, 1.0])
@pytest.mark.parametrize("k", [1, 3, 128, 129, 300])
def test_upper_factor_of_the_inverse(k: int, wanted: float) -> None:
    h = gram(k)
    factor, damp = inverse_factor(h, wanted)
    damped = h.double() + wanted * h.double().diagonal().mean() * torch.eye(k)
    assert damp == wanted
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    torch.testing.assert_close(factor.double().T @ factor.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("k", [1, 127, 257])
def test_triangular_inverse(k: int) -> None:
    lower = torch.linalg.cholesky(gram(k))
    torch.testing.assert_close(invert_lower(lower) @ lower, torch.eye(k), rtol=0, atol=1e-4)


def test_indefinite_matrices_are_damped_then_refused() -> None:
    h = gram(20) - 0.05 * gram(20).diagonal().mean() * torch.eye(20) * 20
    with pytest.raises(
        NumericsError, match=r"cannot be factorized: wanted a positive definite matrix, found none with"
    ):
        inverse_factor(h, 1e-6)
    with pytest.raises(NumericsError):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


def test_ridge_regression_is_that_of_an_augmented_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    h = x.T @ x
    root = (0.3 * h.diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    want = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([y, torch.zeros_like(root)])).solution.T
    found = ridge((y.T @ x).float(), h.float(), 0.3)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)
    assert not ridge(torch.ones(3, 3), torch.zeros(3, 3), 0.3).any()
