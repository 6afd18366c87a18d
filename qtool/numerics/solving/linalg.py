"""Factorizations that the solvers need.

Shape letters: K input features, M matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.numerics.metrics import all_finite
from qtool.numerics.threads.parallel import shares, side_by_side
from qtool.numerics.threads.ranks import ALONE, Ranks

DAMPING_STEPS = (1.0, 10.0, 100.0)
"""Factors on the wanted damping, tried in turn until the matrix factorizes."""

LEAF, DEVICE_LEAF, SPLIT = 128, 512, 512
"""Rows up to which a triangular matrix is solved for, on the CPU and on other devices, and from which on its halves are
inverted side by side."""


def inverse_factor(gram: Tensor, damp: float, ranks: Ranks = ALONE) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of a damped Gram matrix: U with U^T U = (H + damp * mean(diag H) * I)^-1.

    It comes from one factorization of H read backwards and one triangular inverse, without forming the inverse: with J
    the reversal of rows and columns, J H J = L L^T gives H^-1 = (J L^-1 J)^T (J L^-1 J), and J L^-1 J is upper
    triangular.

    Args:
        gram: float32 [K, K], symmetric, positive semidefinite.
        damp: relative to the mean of the diagonal.
        ranks: who is to know it, and inverts together; all have the same matrix.

    Returns:
        (U, float32 [K, K]; the relative damping that was used, larger than `damp` if the matrix did not factorize).

    Raises:
        NumericsError: not positive definite even with 100 times the damping.
    """
    damped, diagonal = gram.flip(0, 1).contiguous(), gram.diagonal().flip(0)
    mean = diagonal.mean()
    del gram  # if nobody else needs it: what is no longer held here is a large part of a run's memory
    for step in DAMPING_STEPS:
        damped.diagonal().copy_(diagonal + damp * step * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if ranks.broadcast(int(info)) == 0:
            inverse = invert_together(lower, ranks)
            del lower
            if all_finite(inverse):
                del damped
                return inverse.flip(0, 1).contiguous(), damp * step
    raise NumericsError(
        "the Gram matrix of calibration inputs cannot be factorized",
        wanted="a positive definite matrix",
        found=f"none with damping up to {damp * DAMPING_STEPS[-1]:g}",
    )


def degrees_of_freedom(gram: Tensor, damp: float) -> float:
    """Of a ridge regression on inputs: the trace of H (H + damp * mean(diag H) * I)^-1, less than their number.

    Args:
        gram: H, float32 [K, K], symmetric, positive semidefinite.
        damp: relative to the mean of the diagonal.

    Raises:
        NumericsError: see `inverse_factor`.
    """
    factor, used = inverse_factor(gram, damp)
    ridge = used * float(gram.diagonal().mean())
    return len(gram) - ridge * float(factor.double().square().sum())


def inverse_factors(grams: Tensor, damp: float) -> Tensor | None:
    """`inverse_factor` of several matrices, float32 [M, K, K]; None if one cannot be factorized with that damping."""
    damped = grams.flip(1, 2).contiguous()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += damp * diagonal.mean(1, keepdim=True)
    found = [torch.linalg.cholesky_ex(one) for one in damped]  # libraries take small matrices together, not these
    inverse = invert_lower(torch.stack([lower for lower, _ in found]))
    fine = (torch.stack([info for _, info in found]) == 0).all() & inverse.sum().isfinite()
    return inverse.flip(1, 2).contiguous() if bool(fine) else None


def ridge(cross: Tensor, gram: Tensor, damp: float) -> Tensor:
    """Ridge regression: A with A (H + damp * mean(diag H) * I) = C, the map from inputs to what they explain.

    Args:
        cross: C, float32 [K, K].
        gram: H, float32 [K, K], symmetric, positive semidefinite.
        damp: relative to the mean of the diagonal.

    Returns:
        A, float32 [K, K]; zeros if the matrix cannot be factorized.
    """
    damped = gram.clone()
    damped.diagonal().add_(damp * damped.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return torch.zeros_like(cross)
    solved: Tensor = torch.cholesky_solve(cross.T, lower).T
    return solved


def invert_together(lower: Tensor, ranks: Ranks) -> Tensor:
    """`invert_lower` of one matrix that all processes have, in all of them the same.

    The first and the last process invert a half each, and every one finds some columns of what lies below them.
    """
    if ranks.size == 1:
        return invert_lower(lower)
    half, inverse = len(lower) // 2, torch.zeros_like(lower)
    halves = {0: slice(half), ranks.size - 1: slice(half, None)}
    mine = {rank: invert_lower(lower[rows, rows]) for rank, rows in halves.items() if rank == ranks.rank}
    for rank, rows in halves.items():
        inverse[rows, rows] = ranks.hand(mine.get(rank, torch.empty_like(lower[rows, rows])), rank)
    columns = [slice(*Ranks(rank, ranks.size).part(half)) for rank in range(ranks.size)]
    corner = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, columns[ranks.rank]])
    for rank, some in enumerate(columns):
        found = corner if rank == ranks.rank else corner.new_empty(len(corner), some.stop - some.start)
        inverse[half:, some] = -ranks.hand(found, rank)
    return inverse


def invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, [..., K, K], by halves, so that nearly all work is products."""
    k = lower.shape[-1]
    if k <= (LEAF if lower.device.type == "cpu" else DEVICE_LEAF):
        identity = torch.eye(k, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = k // 2
    halves = [lower[..., :half, :half], lower[..., half:, half:]]
    first, last = side_by_side(invert_lower, halves, shares(2, lower.device) if k > SPLIT else (1, 1))
    inverse = torch.zeros_like(lower)
    inverse[..., :half, :half], inverse[..., half:, half:] = first, last
    corner = inverse[..., half:, :half]
    if lower.dim() == 2:
        torch.mm(last, lower[half:, :half] @ first, out=corner).neg_()
    else:
        corner.copy_(last @ (lower[..., half:, :half] @ first)).neg_()
    return inverse
