"""One scale for all tokens: how numbers are counted, and how the scale is chosen, against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from qtool.calibrate.inputs import fit_static, quantize_static
from qtool.checkpoint._base import Static
from qtool.errors import NumericsError
from qtool.formats._spelling import parse_format, parse_weights
from qtool.formats.fp import FP
from qtool.formats.int import Int
from qtool.numerics.histogram import BINS, Histogram
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.values import Values


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counted(*batches):
    values = Histogram()
    for batch in batches:
        values.add(batch)
    return values


def test_every_number_is_in_the_bin_that_it_is_nearest_to():
    batches = [random(40, 16), random(40, 16, seed=1) * 9, torch.zeros(3, 16)]
    values, together = counted(*batches), torch.cat(batches)
    assert (values.low, values.high) == (float(together.min()), float(together.max()))
    assert values.reach == 32  # the largest is near 28
    assert float(values.counts.sum()) == together.numel()
    width = 2 * values.reach / BINS
    expected = torch.zeros(BINS)
    for x in together.flatten().tolist():
        expected[int((x + values.reach) / width)] += 1
    assert float((values.counts - expected).abs().sum()) <= 4  # numbers on the border of two bins
    assert_close(values.centers()[0, [0, -1]], torch.tensor([-32 + width / 2, 32 - width / 2]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**126, -3e38])
def test_what_cannot_be_counted_is_refused(value):
    with pytest.raises(NumericsError, match="too large to be counted"):
        counted(torch.tensor([1.0, value, 2.0]))


def test_rows_are_counted_one_by_one():
    batches = [torch.cat([random(3, 50, seed=i) * 4**i, torch.zeros(1, 50)]) for i in range(3)]
    together = Histogram(4, 512)
    for batch in batches:
        together.add(batch)
    for row in range(4):
        alone = Histogram(1, 512)
        for batch in batches:
            alone.add(batch[row])
        assert torch.equal(together.counts[row], alone.counts[0])
        assert (together.low[row], together.high[row]) == (alone.low, alone.high)
        assert torch.equal(together.centers()[row], alone.centers()[0])
    assert_close(together.counts.sum(1), torch.full((4,), 150.0, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_as_many_numbers_are_left_out_below_as_above(share):
    x = random(2, 4000)
    x[1] = x[1].exp()
    values = Histogram(2)
    values.add(x)
    ends = [torch.quantile(x, (1 + sign * share) / 2, dim=1) for sign in (-1, 1)]
    for found, wanted in zip(values.inner(share), ends, strict=True):
        assert_close(found, wanted, rtol=5e-3, atol=5e-3)


def test_no_end_lies_beyond_the_numbers():
    x = torch.tensor([0.5002, 0.6, 0.7502])  # the first and the last inside of a bin
    low, high = counted(x).inner(0.999)
    assert (low, high) == (x[0], x[2])


@pytest.mark.parametrize("factors", [(1, 30), (30, 1), (1e-3, 1)], ids=["grows", "shrinks", "leaps"])
def test_parts_merge_to_the_whole(factors):
    a, b = random(50, 8) * factors[0], random(50, 8, seed=1) * factors[1]
    merged, whole = counted(a), counted(b, a)
    merged.merge(counted(b))
    assert torch.equal(merged.counts, whole.counts)
    assert (merged.low, merged.high, merged.reach) == (whole.low, whole.high, whole.reach)
    merged.merge(Histogram())
    assert torch.equal(merged.counts, whole.counts)


def test_it_is_measured_where_asked_for():
    x = random(20, 8)
    stats = InputStats(8, frozenset({Values}))
    stats.add(x[:7].bfloat16())
    other = InputStats(8, frozenset({Values}))
    other.add(x[7:])
    stats.merge(other)
    assert stats[Values].histogram.high == float(torch.cat([x[:7].bfloat16().float(), x[7:]]).max())
    assert float(stats[Values].histogram.counts.sum()) == 160
    assert Values not in InputStats(8, frozenset({Channels}))


def by_loop(x, fmt, static):
    """Every number on its own, as a runtime rounds it."""
    out = []
    for v in x.flatten().double().tolist():
        if isinstance(fmt, FP):
            q = float(torch.tensor(max(min(v / static.scale, 448.0), -448.0)).to(torch.float8_e4m3fn))
        else:
            q = min(max(round(v / static.scale) + static.zero, -128), 127) - static.zero
        out.append(q * static.scale)
    return torch.tensor(out).view(x.shape)


@pytest.mark.parametrize(
    ("label", "static"),
    [("int8-tensor", Static(0.03)), ("int8-tensor-asym", Static(0.02, -57)), ("fp8-tensor", Static(0.005))],
    ids=["int8", "int8-asym", "fp8"],
)
def test_all_numbers_are_rounded_with_the_same_scale(label, static):
    x, fmt = random(2, 5, 32), parse_format(label)
    assert_close(quantize_static(x, fmt, static), by_loop(x, fmt, static), rtol=1e-5, atol=1e-6)
    assert quantize_static(x.bfloat16(), fmt, static).dtype == torch.bfloat16


def error(x, fmt, static):
    return float((by_loop(x, fmt, static) - x).double().square().sum())


@pytest.mark.parametrize("label", ["int8-tensor", "int8-tensor-asym", "int4-tensor", "fp8-tensor", "fp4-tensor"])
def test_the_search_leaves_less_error_than_covering_everything(label):
    x = random(60, 32) + 0.5
    x[0, :3] = torch.tensor([70.0, -35.0, 50.0])
    fmt = parse_format(label)
    fmt = fmt.model_copy(update={"scale_dtype": "fp32"})
    (found,) = fit_static(counted(x), fmt)
    (covering,) = fit_static(counted(x), fmt.model_copy(update={"scales": "minmax"}))
    ours, wide = (float((quantize_static(x, fmt, s) - x).square().sum()) for s in (found, covering))
    assert ours <= wide * 1.001
    if label.startswith("int8"):
        assert ours == pytest.approx(error(x, fmt, found), rel=1e-3)
    tried = [Static(covering.scale * f, covering.zero) for f in torch.linspace(0.02, 1.2, 60).tolist()]
    best = min(float((quantize_static(x, fmt, s) - x).square().sum()) for s in tried)
    assert ours <= best * 1.03


def test_covering_is_what_the_ends_say():
    x = torch.tensor([[-1.0, 0.5, 3.0]])
    fields = {"bits": 8, "group": "tensor", "scales": "minmax", "scale_dtype": "fp32"}
    assert fit_static(counted(x), Int(**fields)) == (Static(pytest.approx(3 / 127.5)),)
    found = fit_static(counted(x), Int(**fields, symmetric=False))
    assert found == (Static(pytest.approx(4 / 255), -64),)
    fp8 = FP(element="e4m3", group="tensor", scales="minmax", scale_dtype="fp32")
    assert fit_static(counted(x), fp8) == (Static(pytest.approx(3 / 448)),)
    assert fit_static(counted(torch.ones(4) * 2), Int(**fields, symmetric=False))[0].scale == pytest.approx(2 / 255)


def test_the_scale_is_exact_in_the_type_that_it_is_stored_in():
    for label in ("int8-tensor", "fp8-tensor"):
        ((scale, _),) = fit_static(counted(random(9, 9)), parse_format(label))
        assert scale == float(torch.tensor(scale).bfloat16())


def nearest_fp4(x):
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    apart = (abs(x) - levels).abs()
    tied = [i for i in range(8) if float(apart[i]) == float(apart.min())]
    return math.copysign(float(levels[next((i for i in tied if i % 2 == 0), tied[0])]), x)


@pytest.mark.parametrize("label", ["nvfp4", "nvfp4-minmax", "nvfp4-thorough"])
def test_groups_choose_their_scales_inside_of_a_calibrated_one(label):
    x, fmt = random(6, 48), parse_format(label)
    x[0], x[1, :16], x[2, 3] = x[0] / 1e5, 0, 300.0  # nearly nothing, nothing, and more than calibration saw
    ((scale, _),) = fit_static(counted(random(9, 16) * 20), fmt)
    reach = float((random(9, 16) * 20).abs().max()) / (6 * 448)
    assert reach * 0.999999 <= scale < 2 * reach
    if label == "nvfp4":
        assert math.frexp(scale)[0] == 0.5  # exact wherever it is stored
    found = quantize_static(x, fmt, Static(scale))
    for row, group in itertools.product(range(6), range(3)):
        part = x[row, 16 * group : 16 * group + 16]
        local = (part.abs().max() / 6 * (1 / scale)).clamp(max=448).to(torch.float8_e4m3fn)
        step = float(local) * scale or 0.125 * scale
        wanted = [step * nearest_fp4(max(-6, min(6, v / step))) for v in part.tolist()]
        assert_close(found[row, 16 * group : 16 * group + 16], torch.tensor(wanted), rtol=1e-6, atol=0)


def test_a_percentage_of_numbers_is_covered():
    x = random(50, 80) ** 3 * 5 - 1
    fields = {"bits": 8, "group": "tensor", "scale_dtype": "fp32", "symmetric": False}
    (found,) = fit_static(counted(x), Int(**fields, scales=98))
    low, high = torch.quantile(x, 0.01).item(), torch.quantile(x, 0.99).item()
    assert found == Static(pytest.approx((high - low) / 255, rel=3e-3), round(-128 - low / found.scale))
    inside = (x >= (-128.5 - found.zero) * found.scale) & (x <= (127.5 - found.zero) * found.scale)
    assert 0.978 < float(inside.float().mean()) < 0.982
    (widest,) = fit_static(counted(x), Int(**fields, scales="minmax"))
    assert found.scale < widest.scale / 3


def test_each_row_gets_what_it_would_get_alone():
    rows = torch.stack([random(400, seed=i) * 7.0**i + i for i in range(3)])
    values = Histogram(3)
    values.add(rows)
    for scales in ("search", "minmax", 99):
        fmt = Int(bits=4, group="channel", symmetric=False, scales=scales, scale_dtype="fp32")
        assert fit_static(values, fmt) == tuple(fit_static(counted(row), fmt)[0] for row in rows)


def test_augmented_channels_have_their_rounding_errors_rounded_as_well():
    """Side by side, as a wider matrix product sees it: x and its errors, weights and their first columns again."""
    x, w = random(9, 64) * torch.exp(random(64, seed=1)), random(5, 64, seed=2)
    fmt, plain = parse_format({"type": "nvfp4", "augment": 32}), parse_format("nvfp4")
    static = Static(float(x.abs().max()) / 2000, 0)
    found = quantize_static(x, fmt, static)
    first = quantize_static(x, plain, static)
    errors = quantize_static((x - first)[:, :32].contiguous(), plain, static)
    wide = torch.cat([first, errors], 1) @ torch.cat([w, w[:, :32]], 1).T
    assert_close(found @ w.T, wide, rtol=1e-5, atol=1e-5)
    lost, single = (x - found).square().sum(0), (x - first).square().sum(0)
    assert float(lost[:32].sum()) < 0.05 * float(single[:32].sum())
    assert torch.equal(lost[32:], single[32:])
    with pytest.raises(ValueError, match="only inputs have more channels"):
        parse_weights(fmt)


def test_what_rounding_leaves_of_the_first_channels_is_rounded_once_more_and_added():
    x, static = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)), Static(0.003)
    plain, augmented = parse_format("nvfp4"), parse_format({"type": "nvfp4", "augment": 16})
    once = quantize_static(x, plain, static)
    wanted = once.clone()
    wanted[:, :16] += quantize_static(x - once, plain, static)[:, :16]
    assert not torch.equal(wanted, once)
    assert torch.equal(quantize_static(x, augmented, static), wanted)
