"""Alternates closed-form parameters and coordinate descent on codes, against the Gram matrix of a layer's inputs.

For one row, w_hat is linear in its parameters p (a scale per group, and an offset where the format lets it move):
w_hat = B p, a column of B per parameter, zero outside its group. The objective (w - B p)^T H (w - B p) falls most for
the move d with (B^T H B) d = B^T H (w - B p). Formats round parameters to what they store; a row keeps its new ones
only if the objective still falls. For fixed parameters, each code in turn then moves to its best level given all the
others; where codes go together, each vector to its best entry.

`pull` is the rows' (w - w_hat) H, up to a factor the gradient; it is carried along, since it costs as much as the walk.

Shape letters: N rows, K columns, G groups, P parameters per row (G, or 2 G with offsets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, expand
from qtool.numerics.solving.vector_walk import descend_vectors
from qtool.numerics.solving.walk import descend

RIDGE = 1e-5
"""Damping of the normal equations relative to each diagonal entry: leaves alone what the data does not determine."""

CHUNK_BYTES = 64 << 20
"""Size of the normal equations held at once; rows are refined in chunks of that size."""


def refine(w: Tensor, gram: Tensor, q: Quantized, rounds: int, sweeps: int) -> Quantized:
    """Improves a solution; the objective tr(D H D^T) never rises in any row.

    Args:
        w: float32 [N, K].
        gram: float32 [K, K], damped.
        q: codes and parameters to start from.
        rounds: alternations.
        sweeps: most passes of coordinate descent over a row in one round.
    """
    groups = q.format.affine(q.params)[0].shape[1]
    size = max(1, CHUNK_BYTES // (4 * (groups * (1 + q.format.free_offset)) ** 2))
    parts = []
    for a in range(0, len(w), size):
        codes, params = q.codes[a : a + size], {name: p[a : a + size] for name, p in q.params.items()}
        pull = (w[a : a + size] - q.format.decode(codes, params)) @ gram
        for _ in range(rounds):
            if q.format.group_rows == 1:  # what rows share no single row can decide
                params, move = move_parameters(codes, params, q.format, gram, pull)
                pull -= move @ gram
            scale, offset = q.format.affine(params)
            if book := q.format.codebook():
                codes, pull = descend_vectors(gram, (scale, offset), q.format.levels(), book, codes, pull, sweeps)
            else:
                codes, pull = descend(gram, scale, q.format.levels(), codes, pull, sweeps)
        parts.append((codes, params))
    joined = {name: torch.cat([params[name] for _, params in parts]) for name in q.params}
    return Quantized(torch.cat([codes for codes, _ in parts]), joined, q.format)


def move_parameters(codes: Tensor, params: Params, fmt: Format, gram: Tensor, pull: Tensor) -> tuple[Params, Tensor]:
    """The best storable parameters for these codes.

    Args:
        codes: uint8 [N, K].
        params: present parameters.
        fmt: their format.
        gram: float32 [K, K].
        pull: float32 [N, K], (w - w_hat) H.

    Returns:
        (parameters; the change of w_hat, float32 [N, K]).
    """
    scale, offset = fmt.affine(params)
    groups, k = scale.shape[1], codes.shape[1]
    levels = fmt.levels().to(codes.device)[codes.long()]
    if not fmt.free_offset:  # an offset, if there is one, is a multiple of the scale: w_hat = scale * (level - zero)
        levels += expand(offset / torch.where(scale == 0, torch.inf, scale), k)
    normal, right = normal_equations(levels, gram, pull, groups, fmt.free_offset)
    damped = normal.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    wanted, info = torch.linalg.solve_ex(damped, right)
    wanted = torch.where((info == 0)[:, None] & wanted.isfinite().all(1, keepdim=True), wanted, 0.0)
    new_scale, new_offset = scale + wanted[:, :groups], offset + wanted[:, groups:] if fmt.free_offset else offset
    moved = fmt.refit_weighted(params, new_scale, new_offset, damped)
    new_scale, new_offset = fmt.affine(moved)
    step = torch.cat([new_scale - scale, new_offset - offset], dim=1) if fmt.free_offset else new_scale - scale
    change = torch.einsum("np,npq,nq->n", step, normal, step) - 2 * (step * right).sum(1)
    better = (change < 0)[:, None]
    step = torch.where(better, step, 0.0)
    move = levels * expand(step[:, :groups], k)
    if fmt.free_offset:
        move += expand(step[:, groups:], k)
    return {name: torch.where(better, moved[name], old) for name, old in params.items()}, move


def normal_equations(
    levels: Tensor, gram: Tensor, pull: Tensor, groups: int, free_offset: bool
) -> tuple[Tensor, Tensor]:
    """(B^T H B [N, P, P], B^T H (w - w_hat) [N, P]) of every row, scales before offsets.

    Args:
        levels: float32 [N, K], derivative of w_hat by its group's scale.
        gram: float32 [K, K].
        pull: float32 [N, K].
        groups: G; divides K.
        free_offset: whether offsets are parameters.
    """
    n, k = levels.shape
    width = k // groups
    count = groups * (1 + free_offset)

    def per_group(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, width).sum(-1)

    normal = levels.new_empty(n, count, count)
    right = [per_group(pull * levels)] + ([per_group(pull)] if free_offset else [])
    for g in range(groups):
        start = g * width
        first = 0 if free_offset else start  # scale by scale is symmetric: the lower half is a copy
        seen = levels[:, start : start + width] @ gram[start : start + width, first:]
        normal[:, g, g:groups] = normal[:, g:groups, g] = per_group(seen[:, start - first :] * levels[:, start:])
        if free_offset:
            normal[:, g, groups:] = normal[:, groups:, g] = per_group(seen)
    if free_offset:
        normal[:, groups:, groups:] = per_group(per_group(gram).T)
    return normal, torch.cat(right, dim=1)
