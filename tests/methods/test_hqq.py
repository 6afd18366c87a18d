"""Half-quadratic offsets against the plain loop over groups, and against the rounding that they start from."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._spelling import parse_format
from qtool.formats.biased import Biased
from qtool.methods.hqq import HQQ
from qtool.methods.rtn import RTN

W = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)) * 0.03 + 0.01
OTHER = HQQ(power=0.5, beta=2.0, growth=1.1, iterations=7)


def slowly(w: list[float], s: float, m: float, top: int, method: HQQ) -> float:
    """The offset of one group, in float64."""
    best, least, beta = m, float("inf"), method.beta
    for _ in range(method.iterations + 1):
        q = [min(max(round((x - m) / s), 0), top) for x in w]
        errors = [(x - s * c - m) / s for x, c in zip(w, q, strict=True)]
        size = sum(abs(e) ** method.power for e in errors)
        if size >= least:
            break
        best, least = m, size
        let_be = [max(abs(e) - abs(e or 1e-9) ** (method.power - 1) / beta, 0) * (1 if e > 0 else -1) for e in errors]
        m = sum(x - s * c - e * s for x, c, e in zip(w, q, let_be, strict=True)) / len(w)
        beta *= method.growth
    return best


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "method", [HQQ(), HQQ(power=0.5, beta=2.0, growth=1.1, iterations=7)], ids=["default", "other"]
)
def test_offsets_are_those_of_the_plain_loop(bits: int, method: HQQ) -> None:
    fmt = Biased(bits=bits, group=16, scales="minmax", scale_dtype="fp32")
    start, found = fmt.fit(W), method.solve(W, None, fmt).quantized.params
    assert torch.equal(found["scale"], start["scale"])
    grids = (start[name].flatten().tolist() for name in ("scale", "offset"))
    pairs = zip(W.view(-1, 16).double().tolist(), *grids, strict=True)
    wanted = torch.tensor([slowly(w, s, m, (1 << bits) - 1, method) for w, s, m in pairs]).view(8, 4)
    step = start["scale"]
    assert float(((found["offset"] - wanted) / step).abs().max()) < 1e-4
    assert float(((start["offset"] - wanted) / step).abs().max()) > 0.05


@pytest.mark.parametrize("scales", ["minmax", "search"])
def test_the_norm_that_counts_falls_in_every_group(scales: str) -> None:
    fmt = Biased(bits=2, group=32, scales=scales)
    before, after = (m.solve(W, None, fmt).quantized.decode() for m in (RTN(), HQQ()))
    sizes = [(W - w_hat).abs().pow(0.7).view(8, 2, 32).sum(-1) for w_hat in (before, after)]
    assert bool((sizes[1] <= sizes[0] * (1 + 1e-6)).all())
    assert float(sizes[1].sum()) < 0.985 * float(sizes[0].sum())


def test_size_of_weights_and_parts_of_rows_change_nothing() -> None:
    fmt = Biased(bits=3, group=32, scales="minmax", scale_dtype="fp32")
    whole = HQQ().solve(W, None, fmt).quantized.decode()
    parts = [HQQ().solve(W[a : a + 3], None, fmt).quantized.decode() for a in (0, 3, 6)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(HQQ().solve(W * 1024, None, fmt).quantized.decode(), whole * 1024)


def test_what_has_no_free_offset_is_rounded_and_says_so() -> None:
    fmt = parse_format("int4-g32-asym")
    found = HQQ().solve(W, None, fmt)
    assert found.fallback == "rounded to nearest: int4-g32-asym has no offsets that could be moved"
    assert torch.equal(found.quantized.codes, RTN().solve(W, None, fmt).quantized.codes)


def test_groups_of_one_number_stay_exact() -> None:
    w = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 0.375)], dim=1)
    assert torch.equal(HQQ().solve(w, None, Biased(bits=4, group=32)).quantized.decode(), w)
