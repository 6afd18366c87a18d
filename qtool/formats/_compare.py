"""Keeps, block by block, what a simple rule chooses where a search has not found anything better; see `grids.compare`.

Shape letters: N rows, C columns, S blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, expand
from qtool.formats._scaled import Scaled
from qtool.numerics.grids import compare
from qtool.numerics.metrics import block_errors


def better_of(
    fmt: Format,
    w: Tensor,
    first: Params,
    second: Params,
    weight: Tensor,
    blocks: int,
    importance: Tensor | None = None,
) -> Params:
    """Parameters of w with the second ones in each block whose error they make smaller; the first ones stay in a tie.

    Args:
        fmt: what the parameters are of.
        w: float32 [N, C].
        first: parameters.
        second: others; what is the very same tensor in both is left alone.
        weight: float32 [C], of a squared error.
        blocks: S; each has whole numbers of parameters.
        importance: float32 [C] or None, for formats that round by it.
    """
    wins = _wins(fmt, w, first, second, weight, blocks, importance)
    changed = {name: p for name, p in first.items() if p is not second[name]}
    return first | {name: torch.where(expand(wins, p.shape[1]), second[name], p) for name, p in changed.items()}


def _wins(
    fmt: Format, w: Tensor, first: Params, second: Params, weight: Tensor, blocks: int, importance: Tensor | None
) -> Tensor:
    """Where the second parameters make the error of a block smaller, bool [N, S]."""
    levels = compare.casts(fmt.grid) if isinstance(fmt, Scaled) else _steps(fmt)
    if levels is not None:
        return compare.better_blocks(w, fmt.affine(first), fmt.affine(second), levels, weight, blocks)
    decoded = (fmt.decode(fmt.snap(w, p, importance), p) for p in (first, second))
    errors = [block_errors(w, w_hat, weight, blocks) for w_hat in decoded]
    return compare.better(errors[1], errors[0])


def _steps(fmt: Format) -> compare.Levels | None:
    """Consecutive integers, if these are a format's levels, each of which any code may have."""
    lowest, highest = float(fmt.levels()[0]), float(fmt.levels()[-1])
    uniform = fmt.codebook() is None and highest - lowest == len(fmt.levels()) - 1
    return compare.steps(lowest, highest) if uniform else None
