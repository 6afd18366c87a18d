"""Rounding, decoding, comparing and ggml's searches on a CUDA device give what processors give, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._base import Format
from qtool.formats._kquant import KQuant
from qtool.formats._spelling import parse_format
from qtool.numerics.ggml.search import ScaleSearch, ggml_scales
from qtool.numerics.grids.compare import Levels, better_blocks, casts, steps
from qtool.numerics.grids.minifloat import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def odd_weights(n: int = 37) -> Tensor:
    """float32 [n, 768]: usual ones, and groups without values, of one sign, of one value, tiny and large."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(n, 768, generator=generator) * torch.rand(768, generator=generator)
    w[3], w[5, 256:512], w[12], w[13] = 0, 0, 0.5, -0.5
    w[7], w[8], w[10] = w[7].abs(), -w[8].abs(), w[10].sign() * 0.3
    w[9], w[11] = w[9] * 1e-12, w[11] * 1e4
    return w


@pytest.mark.parametrize("label", K_QUANTS)
def test_choices_of_ggml(label: str) -> None:
    fmt, w = parse_format(label), odd_weights()
    assert isinstance(fmt, KQuant)
    want, found = fmt.ggml_choice(w, None), fmt.ggml_choice(w.cuda(), None)
    for a, b in list(zip(want, found, strict=True))[:: 1 if fmt.minima else 2]:
        assert torch.equal(a, b.cpu())


def test_choices_of_ggml_without_super_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, w, seen = parse_format("q5_k"), odd_weights(), list[ScaleSearch]()
    assert isinstance(fmt, KQuant)
    monkeypatch.setattr("qtool.numerics.ggml.search.ggml_scales", lambda x, _, kind, block: seen.append(kind))
    fmt.ggml_choice(w, None)
    monkeypatch.undo()
    kind = seen[0]._replace(top=seen[0].top * 0)
    want, found = (ggml_scales(x, None, kind, 768) for x in (w, w.cuda()))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(want[:2], found[:2], strict=True))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -(2.0**49)])
def test_weights_that_are_not_searched(odd: float) -> None:
    w = odd_weights()
    w[4, 2] = odd
    for device in ("cpu", "cuda"):
        with pytest.raises(NumericsError, match="range in which scales are searched"):
            parse_format("q4_k").fit(w.to(device))


@pytest.mark.parametrize("label", [*K_QUANTS, "int4-g32", "int3-g64-asym", "int8-channel", "biased4-g64", "nf4-g64"])
def test_rounding_and_decoding(label: str) -> None:
    fmt, w = informed(parse_format(label), odd_weights()), odd_weights()
    params = fmt.fit(w)
    there = {name: p.cuda() for name, p in params.items()}
    codes = fmt.snap(w, params)
    assert torch.equal(fmt.snap(w.cuda(), there).cpu(), codes)
    assert torch.equal(fmt.decode(codes.cuda(), there).cpu(), fmt.decode(codes, params))


def informed(fmt: Format, w: Tensor) -> Format:
    """A format that knows the largest weight, if it wants to."""
    return fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt


@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("levels", [steps(-8, 7), steps(0, 3), casts(Grid(1, 0, 6.0)), casts(Grid(3, -6, 448.0))])
def test_comparing(levels: Levels, groups: int) -> None:
    generator, w = torch.Generator().manual_seed(4), odd_weights()
    scale = 0.1 + torch.rand(len(w), groups, generator=generator)
    offset = torch.zeros_like(scale) if levels.floating else 0.1 * torch.randn(scale.shape, generator=generator)
    other = scale * (1 + 0.05 * torch.randn(scale.shape, generator=generator))
    scale[2], other[1], weight = 0, scale[1], torch.rand(768, generator=generator)
    pairs = (scale, offset), (other, offset)
    for blocks in {1, groups}:
        want = better_blocks(w, *pairs, levels, weight, blocks)
        there = [tuple(p.cuda() for p in pair) for pair in pairs]
        assert torch.equal(better_blocks(w.cuda(), *there, levels, weight, blocks).cpu(), want)
        assert 0 < int(want.sum()) < want.numel()
