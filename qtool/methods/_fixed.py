"""Soft rounding with scales that stay: what does not depend on rounding variables is computed once, not every step.

Values and gradients are those of `_soft.soft_decode`, bit by bit. On devices nothing here waits for a result, so steps
are queued one behind the other.

Shape letters: N rows, K columns, G groups, L levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtool.formats._base import Format, Params
from qtool.methods._soft import is_uniform, level_at, place, relative


class FixedRounding:
    """Weights of one matrix as functions of its rounding variables.

    Args:
        w: weights, float32 [N, K].
        fmt: a scalar format.
        params: its parameters.
    """

    def __init__(self, w: Tensor, fmt: Format, params: Params) -> None:
        self.levels = fmt.levels().to(w.device)
        scale, offset = fmt.affine(params)
        self.groups = scale.shape[1]
        self.scale, self.offset = scale[..., None], offset[..., None] if bool(offset.any()) else None
        x = relative(self.grouped(w), self.scale, offset[..., None])
        self.at, self.top = place(x, self.levels)[0], len(self.levels) - 1
        self.uniform = is_uniform(self.levels)
        self.lowest, self.step = float(self.levels[0]), float(self.levels[1] - self.levels[0])

    def grouped(self, x: Tensor) -> Tensor:
        """[N, K] -> [N, G, K / G], the same memory."""
        return x.view(len(x), self.groups, -1)

    def __call__(self, v: Tensor) -> Tensor:
        """What the format decodes, with gradients by v: float32 [N, K] -> [N, K]."""
        result: Tensor = _Rounded.apply(v, self)  # type: ignore[no-untyped-call]
        return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, fixed: FixedRounding) -> Tensor:
        y = fixed.at + fixed.grouped(v)
        free = (y > -0.5) & (y < fixed.top + 0.5)
        ctx.fixed = fixed
        if fixed.uniform:
            ctx.save_for_backward(free)
            value = y.round_().clamp_(0, fixed.top).mul_(fixed.step).add_(fixed.lowest).mul_(fixed.scale)
        else:
            codes = y.round().clamp_(0, fixed.top).long()
            ctx.save_for_backward(torch.where(free, level_at(y, fixed.levels, even=False)[1], 0.0))
            value = fixed.levels[codes].mul_(fixed.scale)
        if fixed.offset is not None:
            value.add_(fixed.offset)
        return value.view(v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,), fixed = ctx.saved_tensors, ctx.fixed
        if fixed.uniform and fixed.step != 1:
            slope = slope * fixed.step
        return (fixed.grouped(gradient) * (slope * fixed.scale)).view(gradient.shape), None
