"""Normal equations of a grid's parameters against matrices written out in float64."""

from __future__ import annotations

import pytest
import torch

from qtool.numerics.solving.normal import normal_equations, per_group, solve_rows


def problem(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(levels [n, k], gram [k, k], pull [n, k])."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(3 * k, k, generator=generator)
    levels = torch.randint(-7, 8, (n, k), generator=generator).float()
    return levels, x.T @ x, torch.randn(n, k, generator=generator)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(3, 24, 3), (67, 32, 2), (5, 20, 1), (70, 48, 24)])
def test_equations_are_those_of_the_written_out_parameters(n: int, k: int, groups: int, offsets: bool) -> None:
    levels, gram, pull = problem(n, k)
    normal, right = normal_equations(levels, gram, pull, groups, per_group(gram, groups) if offsets else None)
    member = torch.zeros(k, groups, dtype=torch.float64)
    member[torch.arange(k), torch.arange(k) // (k // groups)] = 1
    for row in range(n):
        basis = levels[row].double()[:, None] * member
        basis = torch.cat([basis, member], 1) if offsets else basis
        want = basis.T @ gram.double() @ basis
        torch.testing.assert_close(normal[row].double(), want, rtol=1e-4, atol=3e-6 * float(want.abs().max()))
        torch.testing.assert_close(right[row].double(), basis.T @ pull[row].double(), rtol=1e-4, atol=1e-4)


def test_moves_solve_the_equations_of_each_row() -> None:
    x = torch.randn(4, 30, 6, generator=torch.Generator().manual_seed(0))
    normal, right = x.mT @ x, x.sum(1)
    moves, damped = solve_rows(normal, right)
    want = torch.linalg.solve(normal.double(), right.double().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(moves.double(), want, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(damped, normal, rtol=1e-4, atol=0)


def test_what_the_data_does_not_determine_is_left_alone() -> None:
    """The sum of two parameters is determined, their difference by the ridge alone; a row that has none stays."""
    normal = torch.stack([torch.ones(2, 2), torch.zeros(2, 2), -torch.eye(2)])
    right = torch.tensor([[1.00001, 0.99999], [0.0, 0.0], [1.0, 1.0]])
    moves, _ = solve_rows(normal, right)
    torch.testing.assert_close(moves, torch.tensor([[1.5, -0.5], [0.0, 0.0], [0.0, 0.0]]), rtol=0.05, atol=0.01)
