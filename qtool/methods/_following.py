"""Rounding to nearest whose scales follow what is rounded, with gradients through both.

A format chooses a scale for the numbers at hand, and whoever changes these changes it: the largest of a group sets the
step of all others. Of whatever rule a format chooses by, the gradient is that of a scale in proportion to the group's
range; codes go straight through. So do OmniQuant (https://arxiv.org/abs/2308.13137) and FlatQuant
(https://arxiv.org/abs/2410.09426), whose scales are the range.

Shape letters: N rows, K columns, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format
from qtool.numerics.grids.through import through


def round_following(x: Tensor, fmt: Format) -> Tensor:
    """Rows rounded to nearest, float32 [N, K] -> [N, K], with gradients.

    Args:
        x: float32 [N, K].
        fmt: whose `fit` chooses parameters for these rows; those of vectors go straight through, scales and all.
    """
    kept = x.detach()
    if fmt.needs_largest:
        fmt = fmt.with_largest(float(kept.abs().max()))
    params = fmt.fit(kept)
    value = fmt.decode(fmt.snap(kept, params), params)
    if not (x.requires_grad and torch.is_grad_enabled()) or fmt.codebook() is not None:
        return through(x, value)
    scale, offset = fmt.affine(params)
    groups = x.view(len(x), scale.shape[1], -1)
    low, high = (together(end, fmt.group_rows) for end in (groups.amin(2), groups.amax(2)))
    size = high - low if bool(offset.any()) else torch.maximum(high, -low)
    grown = torch.where(size > 0, (size - size.detach()) / size.detach().clamp_min(1e-30), 0.0)
    levels = fmt.levels()
    bottom, top = float(1.5 * levels[0] - 0.5 * levels[1]), float(1.5 * levels[-1] - 0.5 * levels[-2])
    s, o, rounded = scale[..., None], offset[..., None], value.view(groups.shape)
    ends = s * bottom + o, s * top + o
    inside = (groups > torch.minimum(*ends)) & (groups < torch.maximum(*ends))
    by_size = torch.where(inside, rounded - groups.detach(), rounded - o if fmt.free_offset else rounded)
    relaxed = torch.where(inside, groups, 0.0) + by_size * grown[..., None]
    if fmt.free_offset:
        middle = (high + low) / 2
        shift = middle - middle.detach() - scale * grown * float(levels[0] + levels[-1]) / 2
        relaxed = relaxed + torch.where(inside, 0.0, shift[..., None])
    return through(relaxed.view(x.shape), value)


def together(ends: Tensor, rows: int | None) -> Tensor:
    """Ends of the ranges of groups, [N, G], where some rows share a scale: the farthest of these for each of them."""
    if rows == 1:
        return ends
    parts = torch.split(ends, rows or len(ends))
    return torch.cat([farthest(part).expand_as(part) for part in parts])


def farthest(ends: Tensor) -> Tensor:
    """Of each column the number of the largest magnitude, [N, G] -> [1, G]."""
    return ends.gather(0, ends.detach().abs().argmax(0, keepdim=True))
