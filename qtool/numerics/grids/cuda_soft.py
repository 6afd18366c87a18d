"""Rounding that gradients go through, with scales that stay, on CUDA devices; see `qtool.methods._fixed`.

One pass over the weights each way, in the types that the block computes in, and one for a step down the sign of a
gradient: what is trained is as large as the block, and read and written in each of hundreds of steps. Operations are
rounded one by one, so results are those of torch.

Shape letters: N rows, K columns, G groups of K / G columns, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from qtool.numerics.grids.cuda_affine import EXACT, tiles
from qtool.numerics.solving.cuda_pieces import MAGIC

STEP = 4096
"""Variables of a program."""


class FixedGrid(NamedTuple):
    """What weights are rounded to.

    Attributes:
        scale: float32 [N, G].
        offset: float32 [N, G]; None: all 0.
        levels: float32 [L], on the device.
        uniform: whether all steps are as wide.
        lowest, step: the first level and the first step.
    """

    scale: Tensor
    offset: Tensor | None
    levels: Tensor
    uniform: bool
    lowest: float
    step: float


@triton.jit
def value_kernel(  # type: ignore[no-untyped-def]
    y, scale, offset, levels, value, columns, width, top, lowest, step,
    uniform: tl.constexpr, shifted: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A program fills a tile of a row of value [N, K] for places y, float32 [N, K]; scale, offset [N, G]."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    inside, g = j < columns, n * (columns // width) + j // width
    code = tl.load(y + n * columns + j, inside, 0.0)
    code = tl.minimum(tl.maximum((code + MAGIC) - MAGIC, 0.0), top)
    level = code * step + lowest if uniform else tl.load(levels + code.to(tl.int32))
    found = level * tl.load(scale + g, inside, 0.0)
    if shifted:
        found += tl.load(offset + g, inside, 0.0)
    tl.store(value + n * columns + j, found.to(value.dtype.element_ty), inside)


@triton.jit
def slope_kernel(  # type: ignore[no-untyped-def]
    y, scale, levels, gradient, slope, columns, width, top, step, uniform: tl.constexpr, tile: tl.constexpr
):
    """The gradient by places, given that by values: slope float32 [N, K]; the rest as above."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    inside, g = j < columns, n * (columns // width) + j // width
    place = tl.load(y + n * columns + j, inside, 0.0)
    free = (place > -0.5) & (place < top + 0.5)
    if uniform:
        size = tl.where(free, step, 0.0)
    else:
        below = tl.minimum(tl.maximum(tl.floor(place), 0.0), top - 1).to(tl.int32)
        size = tl.where(free, tl.load(levels + below + 1) - tl.load(levels + below), 0.0)
    own = size * tl.load(scale + g, inside, 0.0)
    found = own * tl.load(gradient + n * columns + j, inside, 0.0).to(tl.float32)
    tl.store(slope + n * columns + j, found, inside)


@triton.jit
def sign_kernel(x, gradient, rate, count, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Moves x [count] by a rate, against its gradient's sign."""
    i = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    g = tl.load(gradient + i, i < count, 0.0)
    way = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
    tl.store(x + i, tl.load(x + i, i < count, 0.0) - rate * way, i < count)


def values(y: Tensor, grid: FixedGrid, dtype: torch.dtype) -> Tensor:
    """Of rounded places y, float32 [N, K], contiguous: [N, K] in a type."""
    found, (programs, tile) = torch.empty(y.shape, dtype=dtype, device=y.device), tiles(y.shape)
    width, shifted = y.shape[1] // grid.scale.shape[1], grid.offset is not None
    value_kernel[programs](
        y, grid.scale, grid.scale if grid.offset is None else grid.offset, grid.levels, found, y.shape[1], width,
        float(len(grid.levels) - 1), grid.lowest, grid.step, grid.uniform, shifted, tile, **EXACT,
    )  # fmt: skip
    return found


def slopes(y: Tensor, gradient: Tensor, grid: FixedGrid) -> Tensor:
    """Gradients by places, float32 [N, K], given those by values, [N, K]."""
    found, (programs, tile) = torch.empty_like(y), tiles(y.shape)
    width, top = y.shape[1] // grid.scale.shape[1], float(len(grid.levels) - 1)
    slope_kernel[programs](
        y, grid.scale, grid.levels, gradient.contiguous(), found, y.shape[1], width, top, grid.step, grid.uniform, tile,
        **EXACT,
    )  # fmt: skip
    return found


def descend_sign(x: Tensor, gradient: Tensor, rate: float) -> None:
    """Moves x, float32 and contiguous, by a rate, against its gradient's sign."""
    sign_kernel[(cdiv(x.numel(), STEP),)](x, gradient.contiguous(), rate, x.numel(), STEP, **EXACT)
