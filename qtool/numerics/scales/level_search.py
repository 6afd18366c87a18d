"""Scales for any table of levels: a sweep over clipping ratios, each closed by weighted least squares.

    minimize  sum_j importance_j (x_j - s * T[code_j])^2     over s and codes, group by group

The sweep looks levels up in cells, so that a weight next to the middle of two levels may count as either; the scale is
the best one for what it found. Codes are rounded to final scales later, exactly.

Shape letters: N rows, C columns, G groups of C / G columns, L levels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST, clip_ratios, prepared
from qtool.numerics.scales.table_search import products
from qtool.numerics.threads.parallel import over_rows

STEPS = 24
"""Clipping ratios tried, per end of the table."""
CELLS = 2048
"""That the range of a table is divided into."""


@njit(nogil=True, cache=True, fastmath=FAST)
def level_rows(x, weight, reach, cells, low, ends, ratios, scale, start, stop):  # type: ignore[no-untyped-def]
    """Fills scale [N, G] for rows start to stop. x [N, C]; weight, reach [C]; cells, low: see `products`."""
    width = x.shape[1] // scale.shape[1]
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            v, w = x[n, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
            far, near = np.float32(0.0), np.float32(0.0)
            for j in range(width):
                far, near = max(far, abs(v[j])), max(near, abs(v[j]) * reach[g * width + j])
            best, found = np.float32(-1.0), np.float32(0.0)
            for i in range(len(ratios) if near > 0 else 0):
                extent = far + (near - far) * (np.float32(i) / np.float32(len(ratios) - 1))
                for end in ends:
                    xl, ll = products(v, w, end * ratios[i] / extent, cells, low)
                    if ll > 0 and xl * xl > best * ll:
                        best, found = xl * xl / ll, xl / ll
            scale[n, g] = found


def level_scales(x: Tensor, importance: Tensor | None, levels: Tensor, groups: int) -> Tensor:
    """The scales that leave the least error, of either sign where the table is not symmetric.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        levels: float32 [L], ascending.
        groups: G; divides C.

    Returns:
        float32 [N, G], on the device of x.
    """
    unit = float(levels[-1] - levels[0]) * 2 / CELLS
    middle = float(levels[0]) + unit / 2 * (torch.arange(CELLS) + 0.5)
    cells = (levels[nearest(middle, levels)] / unit).numpy()
    sides = levels[-1:] if torch.equal(levels, -levels.flip(0)) else torch.cat([levels[[0, -1]], -levels[[0, -1]]])
    ends = [end / unit for end in sorted(set(sides.tolist())) if end != 0]
    arrays = prepared(x, importance, x.shape[1] // groups)
    scale, low = np.zeros((len(x), groups), np.float32), np.float32(float(levels[0]) / unit)
    sweep = np.array(ends, np.float32), clip_ratios(len(levels), STEPS)
    over_rows(lambda a, b: level_rows(*arrays, cells, low, *sweep, scale, a, b), len(x))
    return torch.from_numpy(scale / np.float32(unit)).to(x.device)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Indices of the nearest levels, ascending float32 [L]; a tie goes to the lower one."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def lloyd_max(count: int) -> tuple[float, ...]:
    """The levels that leave the least squared error of normal numbers, in units of the largest: k-means, converged.

    Max, https://ieeexplore.ieee.org/document/1057548. Each level is the mean of what is nearest to it.

    Args:
        count: of levels.
    """
    levels = torch.linspace(-2.0, 2.0, count, dtype=torch.float64)
    outside = levels.new_tensor([torch.inf])
    for _ in range(3000):
        edges = torch.cat([-outside, (levels[1:] + levels[:-1]) / 2, outside])
        density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
        levels = -density.diff() / torch.special.ndtr(edges).diff()
        levels = (levels - levels.flip(0)) / 2
    return tuple((levels / levels[-1]).tolist())
