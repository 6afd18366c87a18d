"""Tables of levels against loops, brute force, and what their papers say of them."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.formats._base import Quantized
from qtool.formats._spelling import dump_format, parse_format
from qtool.formats.int import Int
from qtool.formats.lut import LUT, NAMES, named
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.numerics.scales.level_search import lloyd_max
from tests.methods.test_gptq import loss, problem

W = torch.randn(6, 128, generator=torch.Generator().manual_seed(4)) * 0.05


def matrix(fmt, w=W, importance=None):
    params = fmt.fit(w, importance)
    return Quantized(fmt.snap(w, params), params, fmt)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes_as_a_loop_says_and_is_the_nearest(name):
    fmt = parse_format(f"{name}-g32")
    found, levels = matrix(fmt), named(name)
    scale = found.params["scale"].float()
    for n in range(6):
        for j in range(128):
            s, x = float(scale[n, j // 32]), float(W[n, j])
            decoded = [s * level for level in levels]
            assert float(found.decode()[n, j]) == pytest.approx(decoded[found.codes[n, j]], rel=1e-6, abs=1e-9)
            assert abs(x - decoded[found.codes[n, j]]) <= min(abs(x - d) for d in decoded) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("name", ["nf4", "lloyd3", "balanced2", "binary", "signs", "post4"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_comes_near_brute_force(name, weighted):
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    weight = torch.ones(128) if importance is None else importance
    fmt = LUT(table=name, group=64, scale_dtype="fp32")
    errors = ((matrix(fmt, W, importance).decode() - W).square() * weight).view(6, 2, 64).sum(-1)
    levels, groups, best = fmt.levels(), W.view(6, 2, 64), torch.full((6, 2), torch.inf)
    for end in torch.linspace(0.2, 1.3, 400):
        for sign in (1, -1):
            scale = sign * end * groups.abs().amax(-1, keepdim=True) / levels.abs().max()
            near = (groups[..., None] / scale[..., None] - levels).abs().argmin(-1)
            best = torch.minimum(best, ((scale * levels[near] - groups).square() * weight.view(2, 64)).sum(-1))
    assert float((errors / best).max()) < 1.02
    assert float(errors.sum() / best.sum()) < 1.005


def test_minmax_puts_the_largest_weight_on_the_last_level():
    fmt = LUT(table="nf4", group=32, scales="minmax", scale_dtype="fp32")
    assert torch.equal(fmt.fit(W)["scale"], W.view(6, 4, 32).abs().amax(-1))
    one_sided = LUT(table="binary", group=32, scales="minmax", scale_dtype="fp32")
    assert torch.equal(one_sided.fit(W)["scale"], W.view(6, 4, 32).amax(-1))


def test_lloyd_max_levels_are_means_of_what_is_nearest_to_them():
    """Max's tables: 0.4528, 1.510 at four levels; distortions 0.1175 and 0.009497 at four and sixteen."""
    assert lloyd_max(4)[2] == pytest.approx(0.4528 / 1.510, abs=2e-4)
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count, largest, distortion in ((4, 1.510, 0.1175), (16, 2.733, 0.009497)):
        levels = torch.tensor(lloyd_max(count), dtype=torch.float64) * largest
        near = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        assert float((x - near).square().mean()) == pytest.approx(distortion, rel=5e-3)


def test_tables_of_the_papers():
    assert len(named("nf4")) == 16 and named("nf4")[7] == 0
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    assert torch.allclose(torch.tensor(named("nf4")[8:]).flip(0), quantiles / quantiles[0], atol=1e-6)
    assert named("post4")[8:] == pytest.approx([math.sqrt(2) ** -k for k in reversed(range(7))])
    assert named("pot4")[8:] == tuple(2.0**-k for k in reversed(range(7)))
    assert [level * 12 for level in named("bnbfp4")[8:]] == pytest.approx([0.0625, 2, 3, 4, 6, 8, 12])


def test_order_of_tables_on_normal_weights():
    """Levels where normal weights are leave less; powers of two leave more than twice as much as their roots."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(7))
    errors = {n: float((matrix(parse_format(f"{n}-g64"), w).decode() - w).square().sum()) for n in NAMES}
    integers = float((matrix(Int(bits=4, group=64), w).decode() - w).square().sum())
    assert errors["nf4"] < 0.85 * integers
    assert errors["lloyd4"] < 0.85 * integers
    assert errors["pot4"] > 2 * errors["post4"]
    assert errors["balanced2"] < 0.75 * errors["lloyd2"] < 0.75 * errors["ternary"]


def test_gptq_walks_it_and_wins():
    w, stats = problem()
    fmt = parse_format("nf4-g32")
    walked, rounded = (m.solve(w, stats, fmt).quantized for m in (GPTQ(rounds=2), RTN()))
    assert loss(w, walked, stats) < 0.5 * loss(w, rounded, stats)


def test_names_sizes_and_what_is_no_table():
    assert parse_format("nf4-g64") == LUT(table="nf4", group=64)
    assert parse_format("nf4-g64").storage_bits(4, 128) == 4 * 128 * 4 + 8 * 16
    assert parse_format("lloyd3-channel").storage_bits(4, 128) == 4 * 128 * 3 + 4 * 16
    own = parse_format({"type": "lut", "table": [-1, 0, 0.5], "group": 32})
    assert own.label == "lut3-g32" and parse_format(dump_format(own)) == own
    with pytest.raises(ValueError, match="levels have to ascend"):
        parse_format({"type": "lut", "table": [0, 1, 1], "group": 32})
    zeros = torch.zeros(2, 64)
    assert torch.equal(matrix(parse_format("nf4-g32"), zeros).decode(), zeros)
