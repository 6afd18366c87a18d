"""Rounding that gradients go through: codes as rounded real numbers, in every scalar format.

A weight w in a group of (scale, offset) lies somewhere among the levels, at a place counted in steps between them: 0 is
the lowest level, 1 the next one, 2.5 is half-way between the third and the fourth. Its code is that place, plus a
variable v, rounded. The value is exactly what the format decodes; the gradient is that of the same expression without
rounding (a straight-through estimate, https://arxiv.org/abs/1308.3432), as if straight lines joined the levels. With
consecutive integers as levels that is AutoRound's rounding variable (https://arxiv.org/abs/2309.05516) and, for scales,
LSQ's gradient (https://arxiv.org/abs/1902.08153).

Shape letters: N rows, K columns, G groups, L levels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtool.formats._base import Format, Params, Quantized, expand, levels_on
from qtool.numerics.grids.soft import codes_of, slopes_of

MARGIN = 0.01
"""How far from the next code's range a weight begins, in steps, if its own place is in that range."""


def place(x: Tensor, levels: Tensor, even: bool | None = None) -> tuple[Tensor, Tensor]:
    """Where numbers lie among levels, beyond the ends as if these were followed by steps as wide as the last ones.

    Args:
        x: float32 of any shape.
        levels: float32 [L], ascending.
        even: see `level_at`.

    Returns:
        (places in steps; the width of the step that each is in).
    """
    if is_uniform(levels) if even is None else even:
        return (x - levels[0]) / (levels[1] - levels[0]), (levels[1] - levels[0]).expand_as(x)
    below = torch.bucketize(x.detach(), levels[1:-1].contiguous(), right=True)
    width = levels.diff()[below]
    inside = torch.where(width > 0, (x - levels[below]) / torch.where(width > 0, width, 1.0), 0.0)
    return below + inside, width


def level_at(y: Tensor, levels: Tensor, even: bool | None = None) -> tuple[Tensor, Tensor]:
    """The inverse of `place`: (numbers at places y; the width of the step that each is in).

    Args:
        y: float32 of any shape.
        levels: float32 [L], ascending.
        even: whether they `is_uniform`, which is seldom known without waiting for a device; None: find out.
    """
    if is_uniform(levels) if even is None else even:
        width = levels[1] - levels[0]
        return levels[0] + y * width, width.expand_as(y)
    below = y.detach().floor().clamp(0, len(levels) - 2).long()
    width = levels.diff()[below]
    return levels[below] + (y - below) * width, width


def is_uniform(levels: Tensor) -> bool:
    """True if all steps are equally wide."""
    steps = levels.diff()
    return bool((steps == steps[0]).all())


class Rounded(torch.autograd.Function):
    """w_hat of rounded places; see `soft_decode`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, scale: Tensor, offset: Tensor, fmt: Format, params: Params) -> Tensor:
        """Shapes: w, v [N, K]; scale, offset [N, G], which are those of `params`."""
        levels, even, _, _ = steps_of(fmt, w.device)
        ctx.even, ctx.tied = even, None if fmt.free_offset else relative(offset, scale, 0.0)
        ctx.compiled = w.device.type == "cpu" and not ctx.needs_input_grad[0]
        ctx.save_for_backward(w, v, scale, offset, levels)
        ctx.fmt = fmt
        if ctx.compiled:
            return fmt.decode(codes_of(w, v, scale, offset, levels, even), params)
        codes = located(fmt, w, v, scale, offset)[1].round_().clamp_(0, len(levels) - 1)
        return fmt.decode(codes.to(torch.uint8).view(w.shape), params)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by w, v, scale and offset. An offset that is not free is a fixed multiple of the scale."""
        w, v, scale, offset, levels = ctx.saved_tensors
        by_w: Tensor | None = None
        by_scale: Tensor | None
        by_offset: Tensor | None
        if ctx.compiled:
            by_v, by_scale, by_offset = slopes_of(gradient, w, v, scale, offset, levels, ctx.even)
        else:
            moves, _, *affine = ctx.needs_input_grad[:4]
            by_w, by_v, by_scale, by_offset = slopes(ctx.fmt, gradient, w, v, scale, offset, moves, any(affine))
        if ctx.tied is not None and by_scale is not None and by_offset is not None:
            return by_w, by_v, by_scale + by_offset * ctx.tied, None, None, None
        return by_w, by_v, by_scale, by_offset, None, None


@cache
def steps_of(fmt: Format, device: torch.device) -> tuple[Tensor, bool, float, float]:
    """(levels on the device; whether all steps are as wide; the lowest level; the first step)."""
    levels = fmt.levels()
    return levels_on(fmt, device), is_uniform(levels), float(levels[0]), float(levels[1] - levels[0])


def located(fmt: Format, w: Tensor, v: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """(weights relative to scale and offset; their places among the levels, v added; widths of the steps they are in).

    Shapes are those of `Rounded.forward`, but for results: [N, G, K / G].
    """
    levels, even, lowest, step = steps_of(fmt, w.device)
    own = (len(w), scale.shape[1], -1)
    x = (w.view(own) - offset[..., None]) / scale.masked_fill(scale == 0, torch.inf)[..., None]
    if even:
        y = x - lowest if step == 1 else (x - lowest).div_(step)
        return x, y.add_(v.view(own)), step
    y, width = place(x, levels, False)
    return x, y + v.view(own), width


def slopes(
    fmt: Format, gradient: Tensor, w: Tensor, v: Tensor, scale: Tensor, offset: Tensor, by_w: bool, by_affine: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients by w, v, scale and offset, given that by values; places are computed again, which takes no memory."""
    levels, even, lowest, step = steps_of(fmt, w.device)
    x, y, width = located(fmt, w, v, scale, offset)
    top, g = len(levels) - 1, gradient.view(x.shape)
    free = (y > -0.5) & (y < top + 0.5)
    if even:
        slope = g * free
        back = (slope * (step * scale)[..., None]).view(w.shape)
    else:
        assert isinstance(width, Tensor)
        here = torch.where(free, level_at(y, levels, even)[1], 0.0)
        ratio = torch.where(width > 0, here / torch.where(width > 0, width, 1.0), 0.0)
        slope, back = g * ratio, (g * (here * scale[..., None])).view(w.shape)
    front = slope.view(w.shape) if by_w else None
    if not by_affine:
        return front, back, None, None
    code = y.round_().clamp_(0, top)
    level = code.mul_(step).add_(lowest) if even else levels[code.long()]
    by_scale = torch.addcmul(g * level, slope, x, value=-1).sum(2)
    return front, back, by_scale, (g - slope).sum(2)


def relative(x: Tensor, scale: Tensor, offset: Tensor | float) -> Tensor:
    """(x - offset) / scale; 0 where the scale is."""
    return torch.where(scale == 0, 0.0, (x - offset) / torch.where(scale == 0, 1.0, scale))


def stored(fmt: Format, params: Params, scale: Tensor | None, offset: Tensor | None) -> Params:
    """Parameters with a wanted scale and offset, float32 [N, G] each, rounded to what the format stores."""
    if scale is None and offset is None:
        return params
    s, o = fmt.affine(params)
    wanted_scale, wanted_offset = s if scale is None else scale.detach(), o if offset is None else offset.detach()
    return fmt.refit(params, wanted_scale, wanted_offset)


def soft_decode(
    w: Tensor, v: Tensor, fmt: Format, params: Params, scale: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """Weights as `fmt` decodes them, with gradients by w, v and, if given, by scale and offset.

    Args:
        w: weights, float32 [N, K].
        v: float32 [N, K], in steps.
        fmt: a scalar format.
        params: its parameters.
        scale: wanted, float32 [N, G]; the nearest storable one is used, the gradient goes straight through.
        offset: the same, for formats whose offsets are free.

    Returns:
        float32 [N, K].
    """
    params = stored(fmt, params, scale, offset)
    s, o = fmt.affine(params)
    if scale is not None:
        s = s.detach() + (scale - scale.detach())
    if offset is not None:
        o = o.detach() + (offset - offset.detach())
    result: Tensor = Rounded.apply(w, v, s, o, fmt, params)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def harden(
    w: Tensor, v: Tensor, fmt: Format, params: Params, scale: Tensor | None = None, offset: Tensor | None = None
) -> Quantized:
    """Codes and parameters whose values are those of `soft_decode` with the same arguments."""
    params = stored(fmt, params, scale, offset)
    levels = fmt.levels().to(w.device)
    s, o = (expand(p, w.shape[1]) for p in fmt.affine(params))
    y = place(relative(w, s, o), levels)[0] + v
    return Quantized(y.round().clamp_(0, len(levels) - 1).to(torch.uint8), params, fmt)


@torch.no_grad()
def soft_start(w: Tensor, quantized: Quantized) -> Tensor:
    """The v nearest to zero with which `harden` gives these codes, float32 [N, K].

    Weights whose places round to another code begin `MARGIN` within the range of their own.

    Args:
        w: the original weights, float32 [N, K].
        quantized: codes that some method found, and parameters.
    """
    y, inside = places(w, quantized)
    return inside - y


@torch.no_grad()
def places(w: Tensor, quantized: Quantized) -> tuple[Tensor, Tensor]:
    """(where weights lie among the levels; the nearest places that round to their codes), float32 [N, K] each."""
    fmt = quantized.format
    levels = fmt.levels().to(w.device)
    s, o = (expand(p.to(w.device), w.shape[1]) for p in fmt.affine(quantized.params))
    y, reach = place(relative(w, s, o), levels)[0], 0.5 - MARGIN
    code = quantized.codes.to(w.device).float()
    return y, torch.clamp(y, code - reach, code + reach)
