from __future__ import annotations

import pytest
import torch

from qtool.numerics.hadamard import known_order, matrix, transform

ORDERS = (1, 2, 4, 12, 20, 24, 28, 36, 64, 96, 128, 148, 192, 180, 576)


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_and_entries_are_signs(n: int) -> None:
    h = matrix(n)
    assert h.abs().eq(1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 16, 128])
def test_powers_of_two_are_sylvester_s(n: int) -> None:
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    assert matrix(n).tolist() == signs


@pytest.mark.parametrize("n", ORDERS)
def test_transform_is_the_product_with_the_matrix(n: int) -> None:
    x = torch.randn(3, 2, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    runs = x.view(3, 2, 2, n)
    expected = torch.stack([runs[:, :, r] @ matrix(n) / n**0.5 for r in range(2)], dim=2).view(3, 2, 2 * n)
    torch.testing.assert_close(transform(x, n), expected, rtol=0, atol=1e-13)


def test_orders_without_a_known_matrix() -> None:
    assert [n for n in range(1, 130) if n % 4 == 0 and not known_order(n)] == [52, 92, 100, 116]
    assert not any(known_order(n) for n in (0, 3, 6, 18, 50, 1000002))
    assert all(known_order(n) for n in (896, 2304, 2560, 3072, 3584, 4096, 5120, 5376, 6656, 13824, 14336, 18944))
