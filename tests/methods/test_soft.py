"""Soft rounding: values are what formats decode, gradients those of the same expression without rounding."""

import pytest
import torch

from qtool.formats._base import Quantized, expand
from qtool.formats._spelling import parse_format
from qtool.methods._fixed import FixedRounding
from qtool.methods._soft import MARGIN, harden, level_at, place, soft_decode, soft_start

LABELS = (
    *("int2-g32", "int3-g32-asym", "int4-g64", "int8-channel", "fp4-g32", "fp8-channel", "mxfp4", "mxfp6", "nvfp4"),
    *("q4_0", "q4_1", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "tq2_0", "iq4_nl", "iq4_xs", "mxint8", "bfp4-g32"),
    *("q5_0", "q5_1", "q5_k", "tq1_0", "mxfp8", "nvint4", "hif4", "biased2-g32", "bilevel3-g32", "qoq-g128", "nf4-g64"),
    "balanced2-g64",
)


def matrix(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 512, generator=generator) * 0.1


def formats(label: str):
    try:
        return parse_format(label)
    except ValueError:
        pytest.fail(f"{label} is no format")


def fitted(label: str):
    w = matrix()
    fmt = formats(label).with_largest(float(w.abs().max()))
    params = fmt.fit(w)
    return w, fmt, params, fmt.snap(w, params)


def textbook_place(x: float, levels: list[float]) -> float:
    """By searching the step that x lies in."""
    for i in range(len(levels) - 1):
        if x < levels[i + 1] or i == len(levels) - 2:
            return i + (x - levels[i]) / (levels[i + 1] - levels[i])
    raise AssertionError


@pytest.mark.parametrize("label", ["int3-g32", "fp4-g32", "iq4_nl", "mxfp6"])
def test_places_are_those_of_a_search_by_hand(label):
    levels = formats(label).levels()
    x = torch.linspace(float(levels[0]) * 1.5 - 0.1, float(levels[-1]) * 1.5 + 0.1, 97)
    y, width = place(x, levels)
    wanted = torch.tensor([textbook_place(float(value), levels.tolist()) for value in x])
    assert torch.allclose(y, wanted, atol=1e-5)
    back, same = level_at(y, levels)
    assert torch.allclose(back, x, atol=1e-5)
    inner = (y - y.round()).abs() > 1e-4
    assert torch.equal(width[inner], same[inner])


@pytest.mark.parametrize("label", LABELS)
def test_values_are_what_the_format_decodes_and_start_where_a_method_ended(label):
    w, fmt, params, codes = fitted(label)
    generator = torch.Generator().manual_seed(1)
    moved = codes.int() + torch.randint(-2, 3, codes.shape, generator=generator)  # as a walk leaves nearest codes
    other = Quantized(moved.clamp(0, len(fmt.levels()) - 1).to(torch.uint8), params, fmt)
    for quantized in (Quantized(codes, params, fmt), other):
        v = soft_start(w, quantized)
        assert torch.equal(soft_decode(w, v, fmt, params), quantized.decode())
        assert torch.equal(harden(w, v, fmt, params).codes, quantized.codes)
    noise = v + torch.randn(v.shape, generator=generator)
    assert torch.equal(soft_decode(w, noise, fmt, params), harden(w, noise, fmt, params).decode())


@pytest.mark.parametrize("label", LABELS)
def test_scales_that_stay_give_the_same_values_and_gradients(label):
    w, fmt, params, codes = fitted(label)
    generator = torch.Generator().manual_seed(1)
    fixed, v = FixedRounding(fmt, params), soft_start(w, Quantized(codes, params, fmt))
    scale, offset = (expand(p, w.shape[1]) for p in fmt.affine(params))
    at = place(torch.where(scale == 0, 0.0, (w - offset) / torch.where(scale == 0, 1.0, scale)), fmt.levels())[0]
    for noise in (0, 1, 30):  # at the start, on other codes, and beyond the ends
        theirs = (v + noise * torch.randn(v.shape, generator=generator)).requires_grad_()
        own = (at + theirs.detach()).requires_grad_()
        gradient = torch.randn(w.shape, generator=generator)
        found, wanted = fixed(own), soft_decode(w, theirs, fmt, params)
        assert torch.equal(found, wanted)
        assert torch.equal(fixed.codes(own), harden(w, theirs, fmt, params).codes)
        found.backward(gradient)
        wanted.backward(gradient)
        assert torch.equal(own.grad, theirs.grad)
        assert float((own.grad != 0).float().mean()) > (0.5 if noise < 30 else 0.01)


def test_a_start_is_zero_where_places_round_to_the_code():
    w, fmt, params, codes = fitted("int4-g64")
    v = soft_start(w, Quantized(codes, params, fmt))
    y = place(w / expand(fmt.affine(params)[0], w.shape[1]), fmt.levels())[0]
    deep = ((y - y.round()).abs() < 0.5 - 2 * MARGIN) & (y > -0.5) & (y < len(fmt.levels()) - 0.5)
    assert deep.float().mean() > 0.9
    assert v[deep].abs().max() < 1e-6


def relaxed(w, v, scale, offset, levels, rest):
    """What the gradient is of: no rounding, but for what it added at the point that is looked at."""
    s, o = expand(scale, w.shape[1]), expand(offset, w.shape[1])
    y = place((w - o) / s, levels)[0] + v
    last = len(levels) - 0.5
    return s * (level_at(y.clamp(-0.5, last), levels)[0] + rest) + o


@pytest.mark.parametrize("label", LABELS)
def test_gradients_are_finite_differences_of_the_relaxed_function(label):
    w, fmt, params, _ = fitted(label)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(w.shape, generator=generator) * 0.3
    direction = torch.randn(w.shape, generator=generator)
    v.requires_grad_()
    w.requires_grad_()
    params = fmt.refit(params, *fmt.affine(params))  # the gradient goes straight through what a format stores
    scale, offset = (p.clone().requires_grad_() for p in fmt.affine(params))
    assert all(torch.equal(p, params[name]) for name, p in fmt.refit(params, scale.detach(), offset.detach()).items())
    free = fmt.free_offset
    leaves = [w, v, scale, *([offset] if free else [])]

    def loss(w):
        return (soft_decode(w, v, fmt, params, scale, offset if free else None) * direction).sum()

    found, compiled = torch.autograd.grad(loss(w), leaves), torch.autograd.grad(loss(w.detach()), leaves[1:])
    assert torch.equal(loss(w), loss(w.detach()))

    w, direction, levels = w.detach().double(), direction.double(), fmt.levels().double()
    v, s, o = v.detach().double(), scale.detach().double(), offset.detach().double()
    y = place((w - expand(o, w.shape[1])) / expand(s, w.shape[1]), levels)[0] + v
    rest = levels[y.round().clamp(0, len(levels) - 1).long()] - level_at(y.clamp(-0.5, len(levels) - 0.5), levels)[0]
    zero = torch.where(s == 0, 0.0, o / torch.where(s == 0, 1.0, s))

    def value(w, v, s, o):
        return (relaxed(w, v, s, o if free else zero * s, levels, rest) * direction).sum()

    points = [t.clone().requires_grad_() for t in (w, v, s, o)]
    exact = torch.autograd.grad(value(*points), points[: len(found)])
    for mine, theirs in zip((*found, *compiled), (*exact, *exact[1:]), strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    for i, theirs in enumerate(exact):
        way = torch.randn(points[i].shape, generator=generator).double() * points[i].detach().abs().mean()
        sides = [value(*(p + (e * way if k == i else 0) for k, p in enumerate(points))) for e in (1e-8, -1e-8)]
        assert float((sides[0] - sides[1]).detach()) / 2e-8 == pytest.approx(float((theirs * way).sum()), rel=1e-4)
    step, row = 1e-6, torch.zeros_like(v)
    row[0] = torch.randn(w.shape[1], generator=generator, dtype=torch.float64)
    difference = float(value(w, v + step * row, s, o) - value(w, v - step * row, s, o)) / (2 * step)
    assert float((found[1].double() * row).sum()) == pytest.approx(difference, rel=1e-3, abs=1e-4)
