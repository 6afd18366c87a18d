"""GPTQ as the paper writes it, one column at a time in float64: what the fast walk must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, expand


def gptq(w: Tensor, gram: Tensor, damp: float, order: list[int], fmt: Format, params: Params) -> Tensor:
    """Codes of a matrix for fixed parameters.

    Args:
        w: [N, K].
        gram: [K, K].
        damp: relative to the mean of the diagonal.
        order: columns in the order in which they are rounded.
        fmt, params: the grid.
    """
    w, h = w.double().clone(), gram.double().clone()
    k = w.shape[1]
    h += damp * h.diagonal().mean() * torch.eye(k, dtype=h.dtype)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    left = list(order)
    inverse = torch.linalg.inv(h[left][:, left])
    while left:
        column = left.pop(0)
        snapped, value = round_column(w[:, column], column, fmt, params, k)
        codes[:, column] = snapped
        error = (w[:, column] - value) / inverse[0, 0]
        for position, other in enumerate(left, start=1):
            w[:, other] -= error * inverse[0, position]
        inverse = without_first(inverse)
    return codes


def without_first(inverse: Tensor) -> Tensor:
    """Inverse of a matrix without its first row and column, from the inverse with them (block elimination)."""
    return inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]


def round_column(x: Tensor, column: int, fmt: Format, params: Params, k: int) -> tuple[Tensor, Tensor]:
    """(codes, values) of one column, found by looking at every level."""
    scale, offset = (expand(p, k)[:, column].double() for p in fmt.affine(params))
    values = fmt.levels().double()[None] * scale[:, None] + offset[:, None]
    codes = (values - x[:, None]).abs().argmin(1)
    return codes.to(torch.uint8), values.gather(1, codes[:, None])[:, 0]


def gptq_by_group(w: Tensor, gram: Tensor, damp: float, order: list[int], fmt: Format, weight: Tensor) -> Tensor:
    """w_hat where a block's parameters are fitted to the corrected weights when the walk first reaches it.

    Args:
        weight: [K], importance of each column in the fit.
        w, gram, damp, order, fmt: as in `gptq`; the order takes one block after the other.
    """
    w, h = w.double().clone(), gram.double().clone()
    k, block = w.shape[1], fmt.block_columns
    assert block
    h += damp * h.diagonal().mean() * torch.eye(k, dtype=h.dtype)
    w_hat = torch.zeros_like(w)
    left, params = list(order), {}
    inverse = torch.linalg.inv(h[left][:, left])
    while left:
        column = left.pop(0)
        b = column // block
        if b not in params:
            part = slice(b * block, (b + 1) * block)
            params[b] = fmt.fit(w[:, part].float(), weight[part])
        _, value = round_column(w[:, column], column % block, fmt, params[b], block)
        w_hat[:, column] = value
        error = (w[:, column] - value) / inverse[0, 0]
        for position, other in enumerate(left, start=1):
            w[:, other] -= error * inverse[0, position]
        inverse = without_first(inverse)
    return w_hat
