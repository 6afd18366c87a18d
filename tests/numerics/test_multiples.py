"""Steps and their nearest multiples, against trying one after the other."""

import math

import numpy as np
import pytest
import torch

from qtool.numerics.scales import multiples
from qtool.numerics.scales.multiples import nearest_multiples
from qtool.numerics.scales.sweep import STRETCH


def one_by_one(x: list[float], d: float, low: int, top: int) -> tuple[float, float]:
    """(the step whose multiples are nearest, in fp16; the squared error)."""
    extreme = max(x, key=abs)
    best, found = d, math.inf
    for start in (d, *(extreme / (low or top) / float(stretch) for stretch in STRETCH)):
        step = start
        for _ in range(2):
            step = float(np.float16(step))
            codes = [min(max(round(v / step), low), top) if step else 0 for v in x]
            error = sum((v - step * code) ** 2 for v, code in zip(x, codes, strict=True))
            if error < found:
                best, found = step, error
            square = sum(code * code for code in codes)
            step = sum(v * code for v, code in zip(x, codes, strict=True)) / square if square else step
    return best, found


@pytest.mark.parametrize(("groups", "limits"), [(8, (0, 63)), (16, (0, 15)), (16, (-32, 31))])
def test_the_best_of_all_trials_is_taken(groups, limits, monkeypatch):
    generator = torch.Generator().manual_seed(groups)
    x = torch.randn(12, 3 * groups, generator=generator)
    x = x.abs() if limits[0] == 0 else x
    x[4] = 0
    d = (torch.rand(12, 3, generator=generator) * 0.1).half().float()
    steps, codes = nearest_multiples(x, d, limits)
    assert float(codes.min()) >= limits[0]
    assert float(codes.max()) <= limits[1]
    assert torch.equal(codes, codes.round())
    left = (x.view(12, 3, groups) - steps[..., None] * codes.view(12, 3, groups)).square().sum(-1)
    for n in range(12):
        for s in range(3):
            step, error = one_by_one(x.view(12, 3, groups)[n, s].tolist(), float(d[n, s]), *limits)
            assert float(left[n, s]) == pytest.approx(error, rel=1e-3, abs=1e-9)
            assert float(steps[n, s]) == pytest.approx(step, rel=2e-3)
    monkeypatch.setitem(multiples.ROOM, "cpu", 100)
    again = nearest_multiples(x, d, limits)
    assert all(torch.equal(a, b) for a, b in zip((steps, codes), again, strict=True))


def test_what_no_step_is_near_has_multiples_of_nothing():
    x, d = torch.tensor([[1.0, math.nan, 2.0, 3.0]]), torch.tensor([[0.25]])
    steps, codes = nearest_multiples(x, d, (0, 15))
    assert steps.tolist() == [[0.25]]
    assert codes.tolist() == [[0, 0, 0, 0]]
