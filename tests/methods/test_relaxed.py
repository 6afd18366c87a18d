"""What can be trained of rounding: where it begins, its values against loops over numbers, its gradients."""

import math
from itertools import product

import pytest
import torch

from qtool.formats._base import Quantized, expand
from qtool.formats._spelling import parse_format
from qtool.methods._mixtures import CERTAINTY, LOGITS, STRETCH, TEMPERATURE
from qtool.methods._soft import MARGIN
from qtool.methods.learned import WAYS

LABELS = ("int2-g32", "int3-g32-asym", "nvfp4", "mxfp4", "q4_0", "q2_k", "q3_k", "iq4_nl", "tq2_0")


def begun(way, label, scales=False, walked=True, seed=0):
    """A matrix, and variables that begin with codes that a walk left: some are not the nearest ones."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 256, generator=g) * 0.1
    fmt = parse_format(label).with_largest(float(w.abs().max()))
    params = fmt.fit(w)
    moved = fmt.snap(w, params).int() + (torch.randint(-1, 2, w.shape, generator=g) if walked else 0)
    start = Quantized(moved.clamp(0, len(fmt.levels()) - 1).to(torch.uint8), params, fmt)
    return w, start, WAYS[way](w, start, scales, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("way", "label"), list(product(("steps", "weights", "sigmoid", "gumbel"), LABELS)))
def test_any_codes_can_be_the_start(way, label):
    for scales in (False, True):
        _, start, x = begun(way, label, scales)
        found = x.solution()
        assert torch.equal(found.codes, start.codes)
        assert torch.equal(found.decode(), start.decode())
        if way in ("steps", "weights"):
            assert torch.allclose(x.weights(0.0), start.decode(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("way", "label"), list(product(("divide", "low-rank", "none"), LABELS)))
def test_nearest_codes_are_the_start(way, label):
    _, start, x = begun(way, label, walked=False)
    assert (x.solution().codes != start.codes).float().mean() < 0.002  # ties
    assert torch.allclose(x.weights(0.0), x.solution().decode(), rtol=1e-5, atol=1e-7)


def test_what_divides_begins_with_codes_of_the_same_sign():
    w, start, x = begun("divide", "int4-g32")
    value = start.decode()
    assert (x.solution().codes == start.codes)[w * value > 0].float().mean() > 0.99
    assert (w * value > 0).float().mean() > 0.8


def numbers(x, way, start, w, drawn, progress, i, j):
    """One weight by hand, on a grid of integers: its value and its code."""
    fmt = start.format
    levels, scale = fmt.levels().tolist(), float(expand(fmt.affine(start.params)[0], w.shape[1])[i, j])
    weight, code = float(w[i, j]), int(start.codes[i, j])
    v = float(x.v[i, j])
    if way == "divide":
        divided = weight / scale / math.exp(v) / math.exp(float(x.row[i]))
        place = min(max(round(divided - levels[0]), 0), len(levels) - 1)
        return scale * levels[place], place
    place = weight / scale - levels[0]
    below = min(max(code if place >= code else code - 1, 0), len(levels) - 2)
    if way == "sigmoid":
        share = min(max(STRETCH / (1 + math.exp(-v)) - (STRETCH - 1) / 2, 0), 1)
        return scale * (levels[below] + share), below + (v > 0)
    certain = CERTAINTY[0] + (CERTAINTY[1] - CERTAINTY[0]) * progress
    heat = TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** progress
    noise = math.log(float(drawn[i, j])) - math.log1p(-float(drawn[i, j]))
    share = 1 / (1 + math.exp(-(LOGITS * certain * (v - 0.5) + noise) / heat))
    return scale * (levels[below] + share), below + (v > 0.5)


@pytest.mark.parametrize("way", ["divide", "sigmoid", "gumbel"])
def test_values_are_those_of_a_loop_over_numbers(way):
    w, start, x = begun(way, "int3-g32")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for variable in x.rounding():
            variable += 0.3 * torch.randn(variable.shape, generator=g)
    progress = 0.4
    x.generator.manual_seed(9)
    values, codes = x.weights(progress).detach(), x.solution().codes
    x.v, x.row = x.v.detach(), getattr(x, "row", x.v).detach()
    drawn = torch.rand(w.shape, generator=torch.Generator().manual_seed(9))
    for i, j in product(range(4), range(0, 256, 7)):
        value, code = numbers(x, way, start, w, drawn, progress, i, j)
        assert float(values[i, j]) == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert int(codes[i, j]) == code


@pytest.mark.parametrize("way", ["weights", "divide", "low-rank"])
def test_weights_that_are_rounded_are_those_of_a_loop_over_numbers(way):
    w, start, x = begun(way, "int3-g32-asym")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for variable in x.rounding():
            variable += 0.3 * torch.randn(variable.shape, generator=g)
    moved, (scale, offset) = x.moved().detach(), (expand(p, 256) for p in start.format.affine(start.params))
    parts = [variable.detach().double() for variable in x.rounding()]
    for i, j in product(range(4), range(0, 256, 7)):
        zero, weight = float(offset[i, j]), float(w[i, j])
        if way == "weights":
            wanted = weight + float(parts[0][i, j]) * float(scale[i, j])
        elif way == "divide":
            wanted = zero + (weight - zero) / math.exp(float(parts[0][i, j])) / math.exp(float(parts[1][i, 0]))
        else:
            left, right, row, column = parts
            inner = sum(float(left[i, r] * right[r, j]) for r in range(left.shape[1]))
            wanted = zero + (weight - zero) / math.exp(inner + float(row[i, 0]) + float(column[0, j]))
        assert float(moved[i, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_undecided_weights_are_what_the_regularizer_counts():
    _, _, x = begun("sigmoid", "int4-g32")
    assert x.penalty(0.1) is None
    for progress, exponent in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        shares = x.share(progress).detach().double()
        wanted = sum(1 - abs(2 * h - 1) ** exponent for h in shares.flatten().tolist()) / shares.numel()
        assert float(x.penalty(progress).detach()) == pytest.approx(wanted, rel=1e-4)
        assert wanted > 0.1


@pytest.mark.parametrize(
    ("way", "label"),
    [
        *product(("sigmoid", "gumbel"), ("int2-g32", "nvfp4", "q2_k", "iq4_nl")),
        *product(("divide", "low-rank", "weights"), ("int3-g32", "q4_0")),
    ],
)
def test_gradients_are_finite_differences_of_the_relaxed_function(way, label):
    """Of what is decoded without rounding, with ends where the grid has them."""
    w, start, x = begun(way, label)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for variable in x.rounding():
            variable += 0.05 * torch.randn(variable.shape, generator=g)
    leaves, direction = [leaf for leaf, _ in x.leaves()], torch.randn(w.shape, generator=g)
    x.generator.manual_seed(5)
    found = torch.autograd.grad((x.weights(0.3) * direction).sum(), leaves)
    levels = start.format.levels()
    scale, offset = (expand(p, w.shape[1]) for p in start.format.affine(start.params))
    ends = torch.stack([offset + scale * (levels[end] + half) for end, half in ((0, -0.5), (-1, 0.5))])

    def relaxed():
        mixed = way in ("sigmoid", "gumbel")
        return x.weights(0.3) if mixed else x.moved().clamp(ends.amin(0), ends.amax(0))

    for number, leaf in enumerate(leaves):
        change = torch.randn(leaf.shape, generator=g).abs() * found[number].sign()  # nothing cancels out
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * 2e-4 * change
                x.generator.manual_seed(5)
                values.append(float((relaxed().double() * direction).sum()))
                leaf -= sign * 2e-4 * change
        difference, size = (values[0] - values[1]) / 4e-4, float((found[number].abs() * change.abs()).sum())
        assert float((found[number] * change).sum()) == pytest.approx(difference, rel=0.004)
        assert size > 0


@pytest.mark.parametrize("label", ["int2-g32", "int3-g32-asym", "nvfp4", "q2_k"])
def test_scales_of_mixtures_get_what_they_multiply(label):
    w, start, x = begun("sigmoid", label, scales=True)
    direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    leaves = [leaf for leaf, decides in x.leaves() if not decides]
    found = torch.autograd.grad((x.weights(0.3) * direction).sum(), leaves)
    scale, offset = (p.double() for p in start.format.affine(start.params))
    mixed = (x.low + x.share(0.3) * x.step).detach().double()
    groups = direction.double().unflatten(1, (scale.shape[1], -1))
    wanted = (groups * mixed.view(groups.shape)).sum(2) * scale
    if not start.format.free_offset:
        wanted = wanted + groups.sum(2) * offset
    assert torch.allclose(found[0].double(), wanted, rtol=1e-4, atol=1e-5)
    assert len(found) == 1 + start.format.free_offset
    if start.format.free_offset:
        assert torch.allclose(found[1].double(), groups.sum(2) * scale, rtol=1e-4, atol=1e-5)


def test_starts_keep_a_distance_from_the_other_code():
    _, start, x = begun("gumbel", "int4-g32")
    up, inside = start.codes.long() > x.below, x.inside.detach()
    assert float(inside[up].min()) == pytest.approx(0.5 + MARGIN)
    assert float(inside[~up].max()) == pytest.approx(0.5 - MARGIN)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4, 256, 4), (96, 64, 16), (96, 256, 24), (640, 128, 32)])
def test_ranks_are_a_fourth_of_the_shorter_side_where_that_is_enough(rows, columns, rank):
    w, fmt = torch.randn(rows, columns), parse_format("int4-g64")
    params = fmt.fit(w)
    start = Quantized(fmt.snap(w, params), params, fmt)
    left, right, row, column = WAYS["low-rank"](w, start, False, torch.Generator()).rounding()
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    assert (row.shape, column.shape) == ((rows, 1), (1, columns))
    assert float((left @ right).detach().abs().max()) == 0 < float(right.detach().abs().min())
