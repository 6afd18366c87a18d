"""Weights that training left on a grid of few levels: the scales, and the integers that they are multiples of.

BitNet b1.58 (https://arxiv.org/abs/2402.17764) has a scale per matrix and levels -1, 0, 1; Tequila
(https://arxiv.org/abs/2509.23809) the same with groups of 128; ParetoQ (https://arxiv.org/abs/2502.02631) a scale per
row, at two bits with levels -1.5, -0.5, 0.5, 1.5, which are odd multiples of half a step. Checkpoints of such models
hold the products, rounded to their type.

Shape letters: N rows, K columns, G groups of K / G columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 4
"""The largest multiple: three bits, or two with levels between the integers."""
GROUPS = (256, 128, 64, 32)
"""Columns that share a scale, where the row as a whole does not have one."""


def multiples(w: Tensor) -> tuple[Tensor, Tensor] | None:
    """The largest groups of columns whose weights are small multiples of one scale each.

    Args:
        w: [N, K], in the type that it is stored in.

    Returns:
        (int8 [N, K], float32 [N, G]): their products, rounded to the type of `w`, are `w`. None if there are none, or
        if all weights are zero.
    """
    if not bool(w.any()):
        return None
    widths = (w.shape[1], *(width for width in GROUPS if w.shape[1] % width == 0 and width < w.shape[1]))
    if of_steps(w, widths[-1]) is None:  # nor are larger groups, which consist of these: nearly all matrices end here
        return None
    return next((found for width in widths if (found := of_groups(w, width))), None)


def of_groups(w: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """The same for groups of `width` columns. Of zeros the scale is 1."""
    if (steps := of_steps(w, width)) is None:
        return None
    stored, size, least, codes = steps
    scale = torch.zeros_like(least)
    for wanted in (least, *middles(size, codes.abs(), torch.finfo(w.dtype).eps)):
        fits = ((codes * wanted).to(w.dtype) == stored).all(2, keepdim=True)
        scale = torch.where((scale == 0) & fits, wanted, scale)
    return (codes.to(torch.int8).view(w.shape), scale.squeeze(2)) if bool((scale > 0).all()) else None


def of_steps(w: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Groups as about multiples of their least number; None if some are more than `MOST`.

    Returns:
        (numbers, their sizes, the least of these or 1, rounded multiples of it), [N, G, width], the third [N, G, 1].
    """
    stored = w.reshape(len(w), -1, width)
    size = stored.float().abs()
    least = torch.where(size > 0, size, torch.inf).amin(2, keepdim=True)
    least = torch.where(least.isinf(), 1.0, least)
    codes = (stored.float() / least).round()
    return (stored, size, least, codes) if bool((codes.abs() <= MOST).all()) else None  # NaN: None as well


def middles(size: Tensor, codes: Tensor, eps: float) -> list[Tensor]:
    """The middle of the scales that all rounded products of a group admit, in types that artifacts store.

    Args:
        size: absolute weights, float32 [N, G, width].
        codes: absolute multiples of the same shape.
        eps: distance of 1 to the next number of the type that products were rounded to.
    """
    mantissa, exponent = torch.frexp(size)  # from 0.5 to less than 1
    above = torch.ldexp(torch.full_like(size, eps / 4), exponent)
    below = torch.where(mantissa == 0.5, above / 2, above)
    k = codes.clamp_min(1)
    low = torch.where(codes > 0, (size - below) / k, 0).amax(2, keepdim=True)
    high = torch.where(codes > 0, (size + above) / k, torch.inf).amin(2, keepdim=True)
    middle = torch.where(high.isinf(), 1.0, (low + high) / 2)
    return [middle.bfloat16().float(), middle.half().float(), middle]
