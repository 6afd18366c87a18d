"""Closed-form scales (and offsets) for known codes, against the Gram matrix of the layer's inputs.

For one row, w_hat is linear in its parameters: w_hat = B p, a column of B per group and parameter, zero outside the group.
The p that minimizes (w - B p)^T H (w - B p) moves from the present p0 by d with (B^T H B) d = B^T H (w - B p0). Solving
for the move, slightly damped, leaves parameters alone that the data does not determine.

Shape letters: N rows, K columns, G groups, P parameters per row (G, or 2 G with offsets).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-5
"""Damping of the normal equations, relative to each diagonal entry."""

CHUNK_BYTES = 64 << 20
"""Size of the batch of normal equations held at once."""


def improve_parameters(
    w: Tensor, w_hat: Tensor, levels: Tensor, gram: Tensor, groups: int, free_offset: bool
) -> tuple[Tensor, Tensor | None]:
    """The least-squares moves of all scales, and of all offsets where they are free.

    Args:
        w, w_hat: float32 [N, K], wanted and present weights.
        levels: float32 [N, K], derivative of w_hat by its group's scale.
        gram: float32 [K, K].
        groups: G; divides K.
        free_offset: also move an offset per group.

    Returns:
        (change of scale, change of offset or None), float32 [N, G] each.
    """
    rows = max(1, CHUNK_BYTES // (4 * (groups * (1 + free_offset)) ** 2))
    parts = [
        _solve(w[a : a + rows] - w_hat[a : a + rows], levels[a : a + rows], gram, groups, free_offset)
        for a in range(0, len(w), rows)
    ]
    move = torch.cat(parts)
    return (move[:, :groups], move[:, groups:]) if free_offset else (move, None)


def _solve(error: Tensor, levels: Tensor, gram: Tensor, groups: int, free_offset: bool) -> Tensor:
    """[N, P] for some rows; see `improve_parameters`."""
    n, k = error.shape
    width = k // groups

    def per_group(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], groups, width).sum(-1)

    count = groups * (1 + free_offset)
    normal = error.new_empty(n, count, count)
    pull = error @ gram
    right = [per_group(pull * levels)] + ([per_group(pull)] if free_offset else [])
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        seen = levels[:, part] @ gram[part]
        normal[:, g, :groups] = per_group(seen * levels)
        if free_offset:
            normal[:, g, groups:] = per_group(seen)
            normal[:, groups:, g] = normal[:, g, groups:]
    if free_offset:
        normal[:, groups:, groups:] = per_group(per_group(gram).T)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    solved, info = torch.linalg.solve_ex(normal, torch.cat(right, dim=1))
    return torch.where((info == 0)[:, None] & solved.isfinite().all(1, keepdim=True), solved, 0.0)
