"""Soft rounding of every scalar format: values against decoded codes, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qtool import registry
from qtool.formats._base import Format, Quantized
from qtool.methods._soft import harden, level_at, moved, place, soft_decode, soft_start
from qtool.recipe.parse import parse_format

MORE = ("int2-g64", "int3-g128-asym", "fp4-g32", "fp8-block", "mxint8", "nvint4")
FAMILIES = {name: registry.load("formats", name) for name in registry.names("formats")}
LABELS = sorted({label for name, family in FAMILIES.items() for label in family.examples or (name,)} | set(MORE))
GENERATOR = torch.Generator().manual_seed(0)
N, K = 32, 256


def informed(label: str, w: Tensor) -> Format:
    fmt = parse_format(label)
    return fmt.given(float(w.abs().max())) if fmt.needs_largest else fmt


def scalar(label: str) -> bool:
    fmt = parse_format(label)
    return fmt.codebook() is None and fmt.granularity not in ("head",)


SCALAR = [label for label in LABELS if scalar(label)]


def relaxed(w: float, v: float, scale: float, offset: float, levels: list[float]) -> tuple[float, float]:
    """(relaxed, rounded) level of one weight, by walking along the polygon of levels."""
    x = (w - offset) / scale if scale else 0.0
    y = 0.0
    if x >= levels[-1]:
        y = len(levels) - 1.0
    elif x > levels[0]:
        i = max(i for i, level in enumerate(levels) if level <= x)
        y = i + (x - levels[i]) / (levels[i + 1] - levels[i])
    y = min(max(y + v, 0.0), len(levels) - 1.0)
    i = min(math.floor(y), len(levels) - 2)
    return levels[i] + (y - i) * (levels[i + 1] - levels[i]), levels[round(y)]


@pytest.mark.parametrize("label", SCALAR)
def test_it_starts_from_any_codes_and_values_are_what_the_format_decodes(label: str) -> None:
    w = torch.randn(N, K, generator=GENERATOR)
    fmt = informed(label, w)
    params = fmt.fit(w)
    moves = torch.randint(-1, 2, w.shape, generator=GENERATOR)
    codes = (fmt.snap(w, params).int() + moves).clamp(0, len(fmt.levels()) - 1)
    q = Quantized(codes.to(torch.uint8), params, fmt)
    v = soft_start(w, q)
    assert torch.equal(harden(w, v, fmt, params).codes, q.codes)
    assert torch.equal(soft_decode(w, v, fmt, params), q.decode())
    plain = harden(w, torch.zeros_like(w), fmt, params).decode()
    nearest = fmt.decode(fmt.snap(w, params), params)
    assert_close((plain - w).abs(), (nearest - w).abs(), rtol=1e-4, atol=1e-6)  # ties may be broken otherwise


@pytest.mark.parametrize("label", SCALAR)
def test_gradients_are_those_of_the_relaxed_function(label: str) -> None:
    w = torch.randn(N, K, generator=GENERATOR)
    fmt = informed(label, w)
    params, levels = fmt.fit(w), fmt.levels().tolist()
    scale, offset = (p.clone().requires_grad_() for p in fmt.affine(params))
    v = (torch.rand(w.shape, generator=GENERATOR) - 0.5).requires_grad_()
    weight = torch.randn(w.shape, generator=GENERATOR)
    found = soft_decode(w, v, fmt, params, scale, offset if fmt.free_offset else None)
    (found * weight).sum().backward()
    s, o = fmt.affine(fmt.refit(params, scale.detach(), offset.detach()))
    groups, width = s.shape[1], K // s.shape[1]
    here, slopes = v.detach(), v.grad
    assert slopes is not None
    for i in range(0, N * K, 97):
        n, k = divmod(i, K)
        at = [float(x) for x in (w[n, k], here[n, k], s[n, k // width], o[n, k // width])]
        y = float(moved(*(torch.tensor([x]) for x in at), fmt.levels()))
        if abs(y - round(y)) < 0.01 or not 0.01 < y < len(levels) - 1.01 or at[2] == 0:
            continue  # at a bend of the polygon there is no derivative
        above, below = (relaxed(at[0], at[1] + d, *at[2:], levels)[0] for d in (1e-4, -1e-4))
        wanted = at[2] * (above - below) / 2e-4 * float(weight[n, k])
        assert float(slopes[n, k]) == pytest.approx(wanted, rel=1e-2, abs=1e-6)
    row, column = 3, groups // 2

    def value(move: float, shift: float) -> float:
        """The weighted sum of a row's group, rounding errors of levels kept as they are."""
        total = 0.0
        for k in range(column * width, (column + 1) * width):
            s0, o0 = float(s[row, column]), float(o[row, column])
            at = float(w[row, k]), float(here[row, k])
            smooth, hard = relaxed(*at, s0, o0, levels)
            s1 = s0 + move
            o1 = o0 + shift if fmt.free_offset else o0 * s1 / s0
            total += float(weight[row, k]) * (s1 * (relaxed(*at, s1, o1, levels)[0] + hard - smooth) + o1)
        return total

    assert scale.grad is not None
    step = 1e-5 * abs(float(s[row, column]))
    numeric = (value(step, 0) - value(-step, 0)) / (2 * step)
    assert float(scale.grad[row, column]) == pytest.approx(numeric, rel=2e-2, abs=2e-2 * float(weight[row].norm()))
    if fmt.free_offset:
        assert offset.grad is not None
        numeric = (value(0, step) - value(0, -step)) / (2 * step)
        assert float(offset.grad[row, column]) == pytest.approx(numeric, rel=2e-2, abs=2e-2)


def test_places_are_read_off_the_polygon() -> None:
    uneven = torch.tensor([-6.0, -1.0, 0.0, 0.5, 4.0])
    x = torch.tensor([-9.0, -6.0, -3.5, -1.0, 0.25, 0.5, 2.25, 4.0, 7.0])
    y = torch.tensor([0.0, 0.0, 0.5, 1.0, 2.5, 3.0, 3.5, 4.0, 4.0])
    assert torch.equal(place(x, uneven), y)
    assert torch.equal(level_at(y, uneven), x.clamp(-6, 4))
    even = torch.arange(-3.0, 5.0)
    assert torch.equal(place(torch.tensor([-7.0, -2.5, 9.0]), even), torch.tensor([0.0, 0.5, 7.0]))


def test_steps_down_the_gradient_of_v_lower_a_loss() -> None:
    """Learned from round-to-nearest on correlated inputs, codes leave less of the outputs' error."""
    w, mix = torch.randn(16, 64, generator=GENERATOR), torch.randn(64, 64, generator=GENERATOR)
    x = torch.randn(256, 64, generator=GENERATOR) @ (mix[:, :8] @ mix[:8] / 4 + torch.eye(64) / 2)
    fmt = parse_format("int3-g32")
    params = fmt.fit(w)
    v, best, first = torch.zeros(16, 64, requires_grad=True), math.inf, 0.0
    for step in range(200):
        loss = (x @ (soft_decode(w, v, fmt, params) - w).T).square().mean()
        best, first = min(best, loss.item()), first or loss.item()
        (grad,) = torch.autograd.grad(loss, v)
        with torch.no_grad():
            v -= 0.003 * (1 - step / 200) * grad.sign()
            v.clamp_(-0.5, 0.5)
    assert best < 0.6 * first
