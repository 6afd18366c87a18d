"""The search for stored scales against one that rounds to every level in turn."""

import pytest
import torch

from qtool.numerics.grids.minifloat import integer, minifloat
from qtool.numerics.grids.scale_codes import LANES, best_code

GRIDS = {"e2m1": minifloat(2, 1), "e3m2": minifloat(3, 2), "e4m3": minifloat(4, 3), "int4": integer(4)}


def error(x, weight, scale, levels):
    """Weighted squared error of x [W], every weight on its nearest level."""
    return float((weight * (x[:, None] - scale * levels).square().amin(1)).sum())


@pytest.mark.parametrize("groups", [1, 3, LANES + 5])
@pytest.mark.parametrize("name", GRIDS)
def test_no_tried_code_has_a_smaller_error(name, groups):
    grid, width, rows, tried = GRIDS[name], 16, 5, (-2, 2)
    generator = torch.Generator().manual_seed(groups)
    x = torch.randn(rows, groups * width, generator=generator)
    importance = torch.rand(groups * width, generator=generator) ** 4
    values = torch.cat([torch.zeros(1), 0.01 * 1.09 ** torch.arange(60)])
    ends = torch.randint(1, 61, (rows, groups, 2), generator=generator).sort(descending=True).values.to(torch.uint8)
    found = best_code(x, importance, ends, values, tried, grid)
    levels = grid.levels().double()
    for n in range(rows):
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            v, weight = x[n, part].double(), importance[part].double()
            around = {min(max(int(end) + step, 1), 60) for end in ends[n, g] for step in range(tried[0], tried[1] + 1)}
            least = min(error(v, weight, values[code].double(), levels) for code in around)
            assert int(found[n, g]) in around
            assert error(v, weight, values[int(found[n, g])].double(), levels) <= least * (1 + 1e-5)
