"""HiF4 against loops over its definition, its own rule for scales, and brute force over all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from qtool.errors import NumericsError
from qtool.formats._spelling import dump_format, parse_format
from qtool.formats.hif4 import LARGEST, HiF4, nearest, value
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from tests.methods.test_gptq import loss, problem

W = torch.randn(6, 128, generator=torch.Generator().manual_seed(8)) * 0.05
W[1] *= torch.linspace(0, 4, 128).exp()
W[2, 3] = 3.0
W[4] = 0


def rounded(fmt, w):
    params = fmt.fit(w)
    return fmt.decode(fmt.snap(w, params), params)


def test_numbers_of_six_and_two_bits():
    for code in range(LARGEST + 1):
        assert float(value(torch.tensor(code))) == 2.0 ** (code // 4 - 48) * (1 + code % 4 / 4)
    codes = torch.arange(LARGEST + 1).to(torch.uint8)
    assert torch.equal(nearest(value(codes)), codes)
    between = (value(codes[:-1]).double() + value(codes[1:]).double()) / 2
    assert torch.equal(nearest((between * (1 + 1e-6)).float()), codes[1:])
    assert torch.equal(nearest((between * (1 - 1e-6)).float()), codes[:-1])
    assert nearest(torch.tensor([0.0, 1e9])).tolist() == [0, LARGEST]


@pytest.mark.parametrize("search", ["default", "minmax"])
def test_every_code_decodes_as_a_loop_says(search):
    fmt = HiF4(search=search)
    params = fmt.fit(W)
    codes = fmt.snap(W, params)
    found = fmt.decode(codes, params)
    for n, j in itertools.product(range(6), range(128)):
        b = float(value(params["base"][n, j // 64]))
        e = int(params["eights"][n, j // 64]) >> (j % 64 // 8) & 1
        f = int(params["fours"][n, j // 32]) >> (j % 32 // 4) & 1
        levels = [b * 2 ** (e + f) * 0.25 * k for k in range(-7, 8)]
        assert float(found[n, j]) == levels[codes[n, j]]
        assert abs(found[n, j] - W[n, j]) <= min(abs(x - float(W[n, j])) for x in levels) * (1 + 1e-6)


def test_minmax_is_the_formats_rule():
    params = HiF4(search="minmax").fit(W)
    for n, s in itertools.product(range(6), range(2)):
        x = W[n, 64 * s : 64 * s + 64].abs()
        wanted = float(x.max()) / 7
        distances = (value(torch.arange(LARGEST + 1)) - wanted).abs()
        b = float(value(params["base"][n, s]))
        assert abs(b - wanted) <= float(distances.min()) * (1 + 1e-6)
        for i in range(8):
            e = float(x[8 * i : 8 * i + 8].max()) / b >= 4
            assert (int(params["eights"][n, s]) >> i & 1) == e
            for h in range(2):
                f = float(x[8 * i + 4 * h : 8 * i + 4 * h + 4].max()) / b / 2**e >= 2
                assert (int(params["fours"][n, 2 * s + i // 4]) >> (2 * (i % 4) + h) & 1) == f


def test_search_comes_near_brute_force():
    found, ratios = (rounded(HiF4(), W) - W).double().square().view(6, 2, 64).sum(2), []
    for n, s in itertools.product((0, 1, 2, 3, 5), range(2)):
        x, best = W[n, 64 * s : 64 * s + 64].view(8, 2, 4), math.inf
        for b in value(torch.arange(LARGEST + 1)).tolist():
            steps = torch.tensor([b / 4, b / 2, b])[:, None, None, None]
            errors = ((x / steps).round().clamp(-7, 7) * steps - x).square().sum(3)
            low, high = (torch.minimum(errors[i], errors[i + 1]).sum(1) for i in range(2))
            best = min(best, float(torch.minimum(low, high).sum()))
        ratios.append(float(found[n, s]) / best)
    assert min(ratios) >= 1 - 1e-5
    assert sorted(ratios)[7] <= 1 + 1e-4
    assert max(ratios) <= 1.1
    assert float(found[4].sum()) == 0


def test_decibels_of_normal_numbers():
    """In a study that has the format: 21.6 dB, 1.2 more than NVFP4 with its usual rule."""
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(1))
    decibels = {
        name: -10 * math.log10(float((rounded(f.with_largest(float(w.abs().max())), w) - w).square().mean()))
        for name in ("hif4", "hif4-minmax", "nvfp4-minmax")
        for f in [parse_format(name)]
    }
    assert decibels["hif4-minmax"] == pytest.approx(21.6, abs=0.1)
    assert decibels["hif4-minmax"] > decibels["nvfp4-minmax"] + 1
    assert decibels["hif4"] > decibels["hif4-minmax"] + 0.35


def test_a_refit_moves_the_base_to_where_scales_are_met_best():
    fmt, generator = HiF4(), torch.Generator().manual_seed(2)
    params = fmt.fit(W)
    scale = fmt.affine(params)[0]
    wanted = scale * torch.exp(0.5 * torch.randn(scale.shape, generator=generator))
    moved = fmt.refit(params, wanted, torch.zeros_like(scale))
    assert all(torch.equal(moved[name], params[name]) for name in ("eights", "fours"))
    for n, s in itertools.product((0, 1, 2, 3, 5), range(2)):
        tried = {name: p[n : n + 1].clone() for name, p in params.items()}
        misses = []
        for code in range(LARGEST + 1):
            tried["base"][0, s] = code
            found = fmt.affine(tried)[0][0, 16 * s : 16 * s + 16]
            misses.append(float((found.double() - wanted[n, 16 * s : 16 * s + 16]).square().sum()))
        assert misses[int(moved["base"][n, s])] <= min(misses) * (1 + 1e-5)


def test_gptq_walks_it_and_wins():
    w, stats = problem(n=16, k=128, tokens=512)
    losses = [loss(w, m.solve(w, stats, HiF4()).quantized, stats) for m in (GPTQ(rounds=1), GPTQ(rounds=0), RTN())]
    assert losses[0] < losses[1] < 0.6 * losses[2]


def test_names_sizes_and_what_is_too_large():
    for name in ("hif4", "hif4-minmax"):
        assert dump_format(parse_format(name)) == name
    assert HiF4().storage_bits(2, 128) == 2 * 128 * 4.5
    assert HiF4().misfit(96) is not None
    with pytest.raises(NumericsError, match="out of the range"):
        HiF4().fit(torch.full((1, 64), 1e6))
    with pytest.raises(NumericsError):
        HiF4().fit(torch.full((1, 64), torch.nan))
