"""Soft rounding with scales that stay: what is trained are the places themselves, and scales are asked for once.

Values and gradients are those of `_soft.soft_decode`, bit by bit. Nothing but places is kept of each weight. On devices
nothing here waits for a result, so steps are queued one behind the other.

Shape letters: N rows, K columns, G groups, L levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtool.formats._base import Format, Params, levels_on
from qtool.methods._soft import level_at, steps_of


class FixedRounding:
    """Weights of one matrix as functions of their places among the levels.

    Args:
        fmt: a scalar format.
        params: its parameters, on the device.
    """

    def __init__(self, fmt: Format, params: Params) -> None:
        scale, offset = (p.contiguous() for p in fmt.affine(params))
        self.groups = scale.shape[1]
        self.scale, self.offset = scale[..., None], offset[..., None] if bool(offset.any()) else None
        self.levels = levels_on(fmt, scale.device)
        _, self.uniform, self.lowest, self.step = steps_of(fmt, scale.device)
        self.top = len(self.levels) - 1
        self.plain = scale, None if self.offset is None else offset

    def __call__(self, y: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the format decodes, in a type, with gradients by places y: float32 [N, K] -> [N, K]."""
        kind = _RoundedThere if y.is_cuda else _Rounded
        result: Tensor = kind.apply(y, self, dtype)  # type: ignore[no-untyped-call]
        return result.to(dtype)

    @torch.no_grad()
    def codes(self, y: Tensor) -> Tensor:
        """The codes of these values, uint8 [N, K]."""
        return y.round().clamp_(0, self.top).to(torch.uint8)


class _Rounded(torch.autograd.Function):
    """In float32, whatever type is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, fixed: FixedRounding, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(y)
        ctx.fixed = fixed
        code = y.round().clamp_(0, fixed.top)
        if fixed.uniform:
            level = (code if fixed.step == 1 else code.mul_(fixed.step)).add_(fixed.lowest)
        else:
            level = fixed.levels[code.long()]
        value = level.view(len(y), fixed.groups, -1).mul_(fixed.scale)
        if fixed.offset is not None:
            value.add_(fixed.offset)
        return value.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,), fixed = ctx.saved_tensors, ctx.fixed
        free = (y > -0.5) & (y < fixed.top + 0.5)
        slope = free * fixed.step if fixed.uniform else torch.where(free, level_at(y, fixed.levels, even=False)[1], 0.0)
        slope = slope.view(len(y), fixed.groups, -1) * fixed.scale
        return slope.mul_(gradient.view(slope.shape)).view(y.shape), None, None


class _RoundedThere(torch.autograd.Function):
    """The same on CUDA devices, in the type that is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, fixed: FixedRounding, dtype: torch.dtype) -> Tensor:
        from qtool.numerics.grids import cuda_soft

        ctx.grid = cuda_soft.FixedGrid(*fixed.plain, fixed.levels, fixed.uniform, fixed.lowest, fixed.step)
        ctx.save_for_backward(y)
        return cuda_soft.values(y, ctx.grid, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        from qtool.numerics.grids import cuda_soft

        (y,) = ctx.saved_tensors
        return cuda_soft.slopes(y, gradient, ctx.grid), None, None
