"""What ggml's encoders choose without importances, on CUDA devices, to the last bit; see `ggml.search`.

Shape letters: N rows, K columns, G groups of a row, S super-blocks of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from triton import cdiv

from qtool.numerics.checks import refuse_unsearchable
from qtool.numerics.ggml.cuda_groups import polished_kernel, shifted_kernel, signed_kernel
from qtool.numerics.ggml.groups import EPSILON, NEAREST_FIRST, Sweep
from qtool.numerics.grids.cuda_affine import EXACT
from qtool.numerics.scales.cuda_search import on_device

ScaleSearch = tuple[int, np.float32, np.float32, bool, np.float32, Sweep, np.float32]
"""Fields of a `search.ScaleSearch`."""

LANES = 128
"""Groups of a program."""


def scales(x: Tensor, kind: ScaleSearch) -> tuple[Tensor, Tensor]:
    """(scale, other), float32 [N, G] each: free scales and what ggml finds beside them; see `search.ggml_rows`."""
    width, levels, _, minima, _, sweep, flat = kind
    side = x.view(-1, width).T.contiguous()
    groups = side.shape[1]
    scale, other = torch.zeros(2, groups, device=x.device)
    grid, rest = (cdiv(groups, LANES),), (groups, width, float(levels))
    if minima:
        lengths = sweep.first + sweep.more * np.arange(sweep.steps, dtype=np.float32) + levels
        rule = float(flat), len(lengths), sweep.absolute
        shifted_kernel[grid](side, scale, other, tried(lengths, x), *rest, *rule, LANES, **EXACT)
    elif sweep.steps:
        lengths = -(levels + np.float32(0.1) * np.array(NEAREST_FIRST, np.float32))
        signed_kernel[grid](side, scale, other, tried(lengths, x), *rest, len(lengths), LANES, **EXACT)
    else:
        polished_kernel[grid](side, scale, *rest, LANES, **EXACT)
    return scale.view(len(x), -1), other.view(len(x), -1)


def tried(lengths: np.ndarray, x: Tensor) -> Tensor:
    """Lengths of the grid that are tried, beside the weights."""
    return on_device(tuple(lengths.tolist()), x.device)


def rounded_steps(x: Tensor, supers: int, top: float, signed: bool) -> tuple[Tensor, Tensor]:
    """(steps [N, S], codes [N, G]) of x [N, G] ~ step * code, the largest code being top, or with signs -top."""
    parts = x.view(len(x), supers, -1)
    if signed:
        extreme, last = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)), top - 1
    else:
        extreme, last = parts.amax(-1, keepdim=True).clamp_min(0), top
    some = extreme.abs() >= float(EPSILON)
    ends = torch.full_like(extreme, -top if signed else top)  # torch divides by numbers, and numbers, in two steps
    inverse = ends / torch.where(some, extreme, 1.0)
    codes = torch.where(some, (inverse * parts).round().clamp_max(last), 0.0)
    step = torch.where(some, 1 / inverse if signed else extreme / ends, 0.0)
    return step.squeeze(-1), codes.flatten(1)


def ggml_scales(x: Tensor, kind: ScaleSearch, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, dmin, a, b) as `search.ggml_scales` has them, for x float32 [N, K].

    Raises:
        NumericsError: see `refuse_unsearchable`.
    """
    refuse_unsearchable(x)
    scale, other = scales(x.float().contiguous(), kind)
    none, supers = x.new_zeros(len(x), 0), x.shape[1] // block
    _, _, top, minima, *_ = kind
    if not top:
        return scale, other, none, none
    d, a = rounded_steps(scale, supers, float(top), not minima)
    dmin, b = rounded_steps(other, supers, float(top), False) if minima else (d, a)
    return d, dmin, a, b
