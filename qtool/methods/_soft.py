"""Soft rounding of every scalar format: a decoded matrix whose codes, weights, scales and offsets have gradients.

A weight's place among the levels of its format is a real number y between 0 and L - 1: level i is at i, and between two
levels places are interpolated. Rounding takes the nearest whole y. A variable v moves the place, so that v = 1 is the
next level whatever the distance to it:

    x = (w - offset) / scale        y = place(x) + v        w_hat = scale * levels[round(y)] + offset

With integers that is the rounding of AutoRound (https://arxiv.org/abs/2309.05516); with floats, whose levels are not
even, each interval has its own slope. Forward, the value is what the format decodes, exactly. Backward, rounding is the
identity: the gradient is that of the relaxed function, which reads levels between the levels off the same polygon, and
a scale's includes the rounding error as learned step sizes have it (https://arxiv.org/abs/1902.08153).

Shape letters: N rows, K columns, G groups, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, expand
from qtool.numerics.grids.through import through


def soft_decode(
    w: Tensor, v: Tensor, fmt: Format, params: Params, scale: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """What `harden` decodes to, float32 [N, K], differentiable in w, v, scale and offset.

    Args:
        w: weights, float32 [N, K].
        v: float32 [N, K], in steps between levels.
        fmt: without a codebook.
        params: its parameters; what `scale` and `offset` do not move stays as it is here.
        scale: learned, float32 [N, G]; counts as the nearest that the format stores. None: that of `params`.
        offset: learned, float32 [N, G], for formats whose offsets are free. None: that of `params`, or as many steps
            from zero as there.
    """
    assert fmt.codebook() is None, "vectors have no soft rounding"
    stored = params if scale is None and offset is None else storable(fmt, params, scale, offset)
    s, o = (expand(p, w.shape[1]) for p in soft_affine(fmt, params, stored, scale, offset))
    levels = fmt.levels().to(w.device)
    y = moved(w, v, s, o, levels)
    codes = y.detach().round()
    value = fmt.decode(codes.to(torch.uint8), stored)
    return through(through(level_at(y, levels), levels[codes.long()]) * s + o, value)


def harden(
    w: Tensor, v: Tensor, fmt: Format, params: Params, scale: Tensor | None = None, offset: Tensor | None = None
) -> Quantized:
    """The codes and parameters that `soft_decode` gives the values of; arguments as there."""
    with torch.no_grad():
        stored = params if scale is None and offset is None else storable(fmt, params, scale, offset)
        s, o = (expand(p, w.shape[1]) for p in fmt.affine(stored))
        return Quantized(moved(w, v, s, o, fmt.levels().to(w.device)).round().to(torch.uint8), stored, fmt)


def soft_start(w: Tensor, quantized: Quantized, margin: float = 0.02) -> Tensor:
    """The smallest v with which `harden` gives these codes, float32 [N, K]; 0 where a code is the nearest one.

    So a weight that lies between two levels is soon rounded to the other one; if all began at their level, none was.

    Args:
        w: weights, float32 [N, K].
        quantized: of the same shape.
        margin: least distance from where another code begins, in steps between levels.
    """
    fmt, codes = quantized.format, quantized.codes.to(w.device, torch.float32)
    s, o = (expand(p, w.shape[1]) for p in fmt.affine(quantized.params))
    y = moved(w, torch.zeros_like(w), s, o, fmt.levels().to(w.device))
    return torch.minimum(torch.maximum(y, codes - (0.5 - margin)), codes + (0.5 - margin)) - y


def storable(fmt: Format, params: Params, scale: Tensor | None, offset: Tensor | None) -> Params:
    """The parameters that a format stores for learned scales and offsets."""
    before = fmt.affine(params)
    s, o = (old if new is None else new.detach() for old, new in zip(before, (scale, offset), strict=True))
    return fmt.refit(params, s, o)


def soft_affine(
    fmt: Format, params: Params, stored: Params, scale: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scale, offset) of stored parameters, float32 [N, G] each, with gradients where they are learned."""
    s, o = fmt.affine(stored)
    if scale is not None:
        s = through(scale, s)
    if offset is not None and fmt.free_offset:
        return s, through(offset, o)
    if scale is not None and not fmt.free_offset:  # an offset, if there is one, is a multiple of the scale
        old_scale, old_offset = fmt.affine(params)
        o = through(s * (old_offset / torch.where(old_scale == 0, 1.0, old_scale)), o)
    return s, o


def moved(w: Tensor, v: Tensor, scale: Tensor, offset: Tensor, levels: Tensor) -> Tensor:
    """y of each weight, float32 [N, K] in [0, L - 1]; scale and offset are [N, K] as well."""
    x = torch.where(scale == 0, 0.0, (w - offset) / torch.where(scale == 0, 1.0, scale))
    return (place(x, levels) + v).clamp(0, len(levels) - 1)


def place(x: Tensor, levels: Tensor) -> Tensor:
    """Where x, float32 of any shape, lies among levels [L]: between 0 and L - 1."""
    top = len(levels) - 1
    if float(levels[-1] - levels[0]) == top:  # consecutive integers
        return (x - levels[0]).clamp(0, top)
    low = torch.bucketize(x.detach(), levels[1:-1], right=True)
    return (low + (x - levels[low]) / (levels[1:] - levels[:-1])[low]).clamp(0, top)


def level_at(y: Tensor, levels: Tensor) -> Tensor:
    """The inverse of `place`: what lies at y, float32 of any shape in [0, L - 1]."""
    top = len(levels) - 1
    if float(levels[-1] - levels[0]) == top:
        return y + levels[0]
    low = y.detach().floor().clamp_max(top - 1)
    below = low.long()
    return levels[below] + (y - low) * (levels[1:] - levels[:-1])[below]
