"""The walk that searches scales on its way against the walk that is given those of the format's own search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._spelling import parse_format
from qtool.numerics.solving.linalg import inverse_factor
from qtool.numerics.solving.walk import searches, walk, walk_searching
from tests.methods.test_refine import gram_of


@pytest.mark.parametrize("k", [32, 160, 288])
@pytest.mark.parametrize("label", ["nvfp4", "mxfp4", "mxfp8", "nvint4"])
def test_codes_and_scales_are_those_of_the_search(label: str, k: int) -> None:
    generator, n = torch.Generator().manual_seed(k), 67
    w = torch.randn(n, k, generator=generator) * torch.rand(k, generator=generator)
    w[3], w[5, :32] = 0, 0
    w[7, 1] = 50.0
    fmt = parse_format(label)
    fmt = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    rule = fmt.on_the_way().search_in_walk()
    assert rule is not None and searches(rule, cuda=False)
    factor, _ = inverse_factor(gram_of(k, 2 * k), 0.01)
    weight = factor.diagonal().square().reciprocal() * (0.01 + torch.rand(k, generator=generator)) ** 4
    codes, parts = walk_searching(w, factor, fmt.levels(), rule, weight)
    fitted = []

    def parameters(a: int, b: int, current: Tensor) -> tuple[Tensor, Tensor]:
        fitted.append(fmt.on_the_way().fit(current.contiguous(), weight[a:b]))
        scale, offset = fmt.affine(fitted[-1])
        return scale.T.expand(b - a, -1), offset.T.expand(b - a, -1)

    want, params = walk(w, factor, fmt.levels(), rule.columns, parameters), fmt.join(fitted)
    found = fmt.of_search(*parts)
    assert found.keys() == params.keys()
    alike = (codes == want).all(1)  # what comes behind a near tie may differ: sums are in another order
    assert alike.float().mean() >= 0.9
    assert all(torch.equal(found[name][alike], p[alike]) for name, p in params.items())


@pytest.mark.parametrize("k", [64, 320])
@pytest.mark.parametrize("label", ["int4-g64", "int3-g32-asym", "int8-g16"])
def test_integers_are_those_of_the_search(label: str, k: int) -> None:
    generator, n = torch.Generator().manual_seed(k), 67
    w = torch.randn(n, k, generator=generator) * torch.rand(k, generator=generator)
    w[3], w[5, :32], w[7, 1] = 0, 0, 50.0
    fmt = parse_format(label)
    rule, width = fmt.on_the_way().search_in_walk(), fmt.group_columns
    assert rule is not None and searches(rule, cuda=False)
    groups = torch.randperm(k // width, generator=generator)
    inside = torch.stack([torch.randperm(width, generator=generator) for _ in groups])
    order = (groups[:, None] * width + inside).flatten()
    factor, _ = inverse_factor(gram_of(k, 2 * k), 0.01)
    weight = factor.diagonal().square().reciprocal() * (0.01 + torch.rand(k, generator=generator)) ** 4
    codes, parts = walk_searching(w[:, order], factor, fmt.levels(), rule, weight[order], order)
    fitted = []

    def parameters(a: int, b: int, current: Tensor) -> tuple[Tensor, Tensor]:
        natural = order[a:b].argsort()
        fitted.append(fmt.on_the_way().fit(current[:, natural].contiguous(), weight[order[a:b]][natural]))
        scale, offset = fmt.affine(fitted[-1])
        return scale.T.expand(b - a, -1), offset.T.expand(b - a, -1)

    want, params = walk(w[:, order], factor, fmt.levels(), width, parameters), fmt.join(fitted)
    assert torch.equal(codes, want)
    found = fmt.of_search(*parts)
    assert found.keys() == params.keys() and all(torch.equal(found[name], p) for name, p in params.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**127])
def test_weights_that_have_no_scale_are_refused(value: float) -> None:
    w = torch.ones(70, 64)
    w[66, 40] = value
    for label in ("mxfp4", "int4-g32"):
        rule = parse_format(label).search_in_walk()
        assert rule is not None
        with pytest.raises(NumericsError, match="range in which scales are searched"):
            walk_searching(w, torch.eye(64), parse_format(label).levels(), rule, torch.ones(64))
