"""Rounding whose scales follow: values are what formats decode, gradients those of finite differences."""

import pytest
import torch

from qtool.formats._spelling import parse_format
from qtool.methods._following import round_following

LABELS = ("int4-g32", "int2-g32", "int4-g32-asym", "int4-channel", "fp4-g32", "mxfp4", "nvfp4", "q4_1", "q5_0")

PLAIN = {"scales": "minmax", "scale_dtype": "fp32"}


def relaxed(x: torch.Tensor, fmt, params, codes: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The function that has the gradient, in float64: codes stay, and move with a weight's own place if that is inside.

    Scales are in proportion to the range of their group, free offsets go with its middle.
    """
    levels, result = fmt.levels().double(), torch.empty_like(x)
    scale, offset = (p.double() for p in fmt.affine(params))
    columns = x.shape[1] // scale.shape[1]
    for n in range(len(x)):
        for g in range(scale.shape[1]):
            part = slice(g * columns, (g + 1) * columns)
            now, then = x[n, part], first[n, part]
            s, o = scale[n, g], offset[n, g]

            def size(v: torch.Tensor) -> torch.Tensor:
                return v.max() - v.min() if bool(offset.any()) else v.abs().max()

            s_now = s * size(now) / size(then)
            if fmt.free_offset:
                middle = (now.max() + now.min() - then.max() - then.min()) / 2
                o_now = o + middle - (s_now - s) * (levels[0] + levels[-1]) / 2
            else:
                o_now = o * s_now / s
            for j in range(columns):
                level, place = levels[int(codes[n, part.start + j])], (now[j] - o_now) / s_now
                begun = (then[j] - o) / s
                low = levels[0] - (levels[1] - levels[0]) / 2
                high = levels[-1] + (levels[-1] - levels[-2]) / 2
                moved = place - begun if low < begun < high else 0.0
                result[n, part.start + j] = s_now * (level + moved) + o_now
    return result


@pytest.mark.parametrize("label", LABELS)
def test_values_are_those_of_the_format_and_gradients_those_of_finite_differences(label):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 64, generator=generator).requires_grad_()
    fmt = parse_format(label)
    known = fmt.with_largest(float(x.detach().abs().max()))
    params = known.fit(x.detach())
    codes = known.snap(x.detach(), params)
    found = round_following(x, fmt)
    assert torch.equal(found, known.decode(codes, params))
    along = torch.randn(2, 64, generator=generator)
    (found * along).sum().backward()
    first, step = x.detach().double(), 1e-6
    for n, j in [(0, int(first[0].argmax())), (1, int(first[1].argmin())), *((i % 2, 5 * i) for i in range(12))]:
        ends = []
        for sign in (1, -1):
            moved = first.clone()
            moved[n, j] += sign * step
            ends.append((relaxed(moved, known, params, codes, first) * along.double()).sum())
        assert float(x.grad[n, j]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), abs=1e-3, rel=1e-3)


def test_rows_that_share_a_scale_send_gradients_to_the_largest_of_all():
    x = torch.tensor([[0.5, 0.25], [-4.0, 0.3]], requires_grad=True)
    round_following(x, parse_format("int8-tensor").model_copy(update=PLAIN))[0, 0].backward()
    code = round(0.5 / (4 / 127.5))
    assert float(x.grad[0, 0]) == pytest.approx(1)
    assert float(x.grad[1, 0]) == pytest.approx(-(code - 0.5 / (4 / 127.5)) / 127.5, abs=1e-4)


def test_vectors_go_straight_through():
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fmt = parse_format("iq3_s")
    found = round_following(x, fmt)
    found.sum().backward()
    assert not torch.equal(found, x)
    assert torch.equal(x.grad, torch.ones_like(x))
