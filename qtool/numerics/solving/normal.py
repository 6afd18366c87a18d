"""Normal equations of the parameters of a grid, row by row, in the metric of a Gram matrix H.

For one row, w_hat is linear in its parameters p: w_hat = B p, a column of B per group's scale, and, where offsets are
free, one per offset. (w - B p)^T H (w - B p) falls most for the move d with (B^T H B) d = B^T H (w - B p).

Shape letters: N rows, K columns, G groups, W columns of a group (K / G), P parameters per row (G, or 2 G with offsets).
"""

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.solving.split import times

RIDGE = 1e-5
"""Damping of the normal equations relative to each diagonal entry: leaves alone what the data does not determine."""

ROWS = 64
"""Rows whose products with the Gram matrix are held at once, so that they stay in the cache."""

TILED = (16, 32, 64)
"""Columns of a group that a kernel of CUDA devices takes; larger ones leave so few that products are as fast."""


@njit(nogil=True, cache=True, fastmath=FAST)
def fold_rows(seen, levels, width, g, normal):  # type: ignore[no-untyped-def]
    """Fills row and column g of normal [n, P, P] from its diagonal up to G.

    seen [n, K - g W] holds the levels of group g times H; levels [n, K].
    """
    for n in range(len(seen)):
        for other in range(seen.shape[1] // width):
            part, factor = seen[n, other * width : (other + 1) * width], levels[n, (g + other) * width :]
            total = part[0] * factor[0]
            for j in range(1, width):
                total += part[j] * factor[j]
            normal[n, g, g + other] = normal[n, g + other, g] = total


def per_group(x: Tensor, groups: int) -> Tensor:
    """Sums over the columns of each group: [..., K] -> [..., G]."""
    return x.reshape(*x.shape[:-1], groups, -1).sum(-1)


def normal_equations(
    levels: Tensor, gram: Tensor, pull: Tensor, groups: int, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B^T H B [N, P, P], B^T H (w - w_hat) [N, P]) of every row, scales before offsets.

    Args:
        levels: float32 [N, K], derivative of w_hat by its group's scale.
        gram: H, float32 [K, K]; on CUDA devices, and without offsets, several, see `split`.
        pull: float32 [N, K], (w - w_hat) H.
        groups: G; divides K.
        sums: `per_group(gram, groups)`, float32 [K, G], where offsets are parameters; else None.
    """
    right = per_group(pull * levels, groups)
    count = groups if sums is None else 2 * groups
    normal = levels.new_empty(len(levels), count, count)
    scale_by_scale(levels, gram, groups, normal)
    if sums is None:
        return normal, right
    mixed = torch.bmm(levels.view(len(levels), groups, -1).transpose(0, 1), sums.view(groups, -1, groups))
    normal[:, :groups, groups:] = mixed.transpose(0, 1)
    normal[:, groups:, :groups] = mixed.permute(1, 2, 0)
    normal[:, groups:, groups:] = per_group(sums.T, groups)
    return normal, torch.cat([right, per_group(pull, groups)], dim=1)


def scale_by_scale(levels: Tensor, gram: Tensor, groups: int, normal: Tensor) -> None:
    """Fills normal[:, :G, :G]; see `normal_equations`."""
    width = levels.shape[1] // groups
    if levels.is_cuda and width in TILED:
        from qtool.numerics.solving import cuda_normal

        cuda_normal.scale_by_scale(levels, gram, groups, normal)
        return
    if levels.is_cuda:
        for g in range(groups):
            start = g * width
            seen = times(levels[:, start : start + width], gram[..., start : start + width, start:])
            normal[:, g, g:groups] = normal[:, g:groups, g] = per_group(seen.mul_(levels[:, start:]), groups - g)
        return
    values, filled = levels.contiguous().numpy(), normal.numpy()
    for a in range(0, len(levels), ROWS):
        for g in range(groups):
            start = g * width
            seen = levels[a : a + ROWS, start : start + width] @ gram[start : start + width, start:]
            fold_rows(seen.numpy(), values[a : a + ROWS], width, g, filled[a : a + ROWS])


def solve_rows(normal: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The moves of all rows; a row whose equations cannot be solved stays where it is.

    Args:
        normal: float32 [N, P, P], symmetric, positive semidefinite.
        right: float32 [N, P].

    Returns:
        (moves, float32 [N, P]; the damped matrices that were solved, float32 [N, P, P]).
    """
    damped = normal.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    lower, info = torch.linalg.cholesky_ex(damped)
    moves = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)
    return torch.where((info == 0)[:, None] & moves.isfinite().all(1, keepdim=True), moves, 0.0), damped
