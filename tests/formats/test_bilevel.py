"""Two levels of scales and zero points: loops over the formula, the paper's rule, and what the second level costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.formats.bilevel import Bilevel
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.numerics.scales.search import free_offset
from tests.methods.test_gptq import loss, problem

W = torch.randn(37, 128, generator=torch.Generator().manual_seed(3)) * 0.05 * torch.linspace(0.5, 2, 37)[:, None]
IMPORTANCE = torch.exp(2 * torch.randn(128, generator=torch.Generator().manual_seed(4)))


def matrix(fmt, w=W, importance=None):
    params = fmt.fit(w, importance)
    return Quantized(fmt.snap(w, params), params, fmt)


def error(fmt, w=W):
    return float((matrix(fmt, w).decode() - w).square().sum())


def test_every_code_decodes_as_a_loop_says():
    fmt = Bilevel(bits=2, group=2, rows=2)
    params = {
        "scale": torch.tensor([[0, 7], [3, 1]], dtype=torch.uint8),
        "zero": torch.tensor([[2, 0], [1, 5]], dtype=torch.uint8),
        "scale_step": torch.tensor([[0.5, 0.25]] * 2).half(),
        "scale_low": torch.tensor([[1.0, 2.0]] * 2).half(),
        "zero_step": torch.tensor([[0.5, 1.0]] * 2).half(),
        "zero_low": torch.tensor([[-1.0, 0.25]] * 2).half(),
    }
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    wanted = torch.empty(2, 4)
    for n, j in itertools.product(range(2), range(4)):
        here = {name: float(p[n, j // 2]) for name, p in params.items()}
        s = here["scale_step"] * here["scale"] + here["scale_low"]
        z = here["zero_step"] * here["zero"] + here["zero_low"]
        wanted[n, j] = s * (float(codes[n, j]) - z)
    assert torch.allclose(fmt.decode(codes, params), wanted, rtol=1e-6)


def test_rows_of_a_block_share_the_second_level_and_it_spans_theirs():
    fmt = Bilevel(bits=3, group=32, rows=16)
    params = fmt.fit(W)
    for name in ("scale_step", "scale_low", "zero_step", "zero_low"):
        for a in (0, 16, 32):
            assert bool((params[name][a : a + 16] == params[name][a]).all())
    single = free_offset(W, None, 32, 7)[0]
    for a in (0, 16, 32):
        here = single[a : a + 16]
        assert torch.equal(params["scale_low"][a], here.amin(0).half())
        span = here.amax(0) - here.amin(0)
        assert torch.allclose(params["scale_step"][a].float() * 7, span, rtol=5e-3, atol=1e-5)


def test_what_the_second_level_costs_and_small_groups_gain():
    fine, coarse = error(parse_format("biased3-g16")), error(parse_format("bilevel3-g16"))
    assert fine < coarse < 1.4 * fine
    assert coarse < 0.7 * error(parse_format("int3-g64"))
    assert error(Bilevel(bits=3, group=16, second=6)) < 1.06 * fine


@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["alike", "weighed"])
def test_second_levels_of_zero_points_span_the_best_ones_for_the_stored_scales(importance):
    fmt = Bilevel(bits=3, group=32, rows=37)
    params = fmt.fit(W, importance)
    weight = torch.ones(128) if importance is None else importance
    scale, offset = (p.double() for p in free_offset(W, importance, 32, 7))
    low, step = (params[f"scale_{name}"].double() for name in ("low", "step"))
    stored = ((scale - low) / step).round().clamp(0, 7) * step + low
    for g in range(4):
        here, zeros = slice(32 * g, 32 * g + 32), []
        for n in range(37):
            x = W[n, here].double() / stored[n, g]
            q = (x - offset[n, g] / stored[n, g]).round().clamp(0, 7)
            zeros.append(float(((q - x) * weight[here]).sum() / weight[here].sum()))
        assert float(params["zero_low"][0, g]) == pytest.approx(min(zeros), rel=2e-3)
        assert float(params["zero_step"][0, g]) * 7 == pytest.approx(max(zeros) - min(zeros), rel=5e-3)


@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["alike", "weighed"])
def test_pairs_of_steps_are_chosen_by_brute_force(importance):
    fmt = Bilevel(bits=3, group=16)
    found, x = matrix(fmt, W, importance), W.view(37, 8, 16)
    weight = (torch.ones(128) if importance is None else importance).view(8, 16)
    least = torch.full((37, 8), torch.inf)
    for c, f in itertools.product(range(8), repeat=2):
        tried = found.params | {
            "scale": torch.full((37, 8), c, dtype=torch.uint8),
            "zero": torch.full((37, 8), f, dtype=torch.uint8),
        }
        apart = fmt.decode(fmt.snap(W, tried), tried).view(x.shape) - x
        least = torch.minimum(least, (apart.square() * weight).sum(2))
    errors = ((found.decode().view(x.shape) - x).square() * weight).sum(2)
    assert bool((errors >= least * (1 - 1e-5)).all())
    assert float((errors <= least * (1 + 1e-5)).float().mean()) > (0.8 if importance is None else 0.65)
    relative = float((errors / weight.mean(1)).sum() / (least / weight.mean(1)).sum())
    assert relative < (1.02 if importance is None else 1.12)


def test_a_weighted_refit_finds_no_worse_pairs_than_a_slow_search():
    fmt, generator = Bilevel(bits=3, group=16, rows=8), torch.Generator().manual_seed(9)
    w = torch.randn(8, 32, generator=generator)
    params = fmt.fit(w)
    root = torch.randn(8, 4, 4, generator=generator)
    bend = root @ root.transpose(1, 2) + 0.1 * torch.eye(4)
    scale, offset = (p + 0.1 * torch.randn(p.shape, generator=generator) for p in fmt.affine(params))

    def cost(tried):
        d = torch.cat([p - wanted for p, wanted in zip(fmt.affine(tried), (scale, offset), strict=True)], 1)
        return torch.einsum("np,npq,nq->n", d, bend, d)

    least = torch.full((8,), torch.inf)
    for codes in itertools.product(range(8), repeat=4):
        tried = torch.tensor(codes, dtype=torch.uint8).expand(8, 4)
        least = torch.minimum(least, cost(params | {"scale": tried[:, :2], "zero": tried[:, 2:]}))
    refitted = fmt.refit_weighted(params, scale, offset, bend)
    turns = params
    for g in (0, 1, 0, 1):  # group by group, the best of all pairs given the other group
        tries = []
        for c, f in itertools.product(range(8), repeat=2):
            tries.append(turns | {name: turns[name].clone() for name in ("scale", "zero")})
            tries[-1]["scale"][:, g], tries[-1]["zero"][:, g] = c, f
        best = torch.stack([cost(tried) for tried in tries]).argmin(0).tolist()
        picked = {name: torch.stack([tries[i][name][n] for n, i in enumerate(best)]) for name in ("scale", "zero")}
        turns = turns | picked
    torch.testing.assert_close(cost(refitted), cost(turns), rtol=1e-3, atol=1e-6)
    found = cost(refitted)
    assert bool((found <= cost(params) * (1 + 1e-5)).all())
    assert float((found / least).median()) < 1.1
    assert int((found <= least * 1.001).sum()) >= 4
    assert float(found.sum()) < 0.5 * float(cost(params).sum())


def test_gptq_walks_it_and_wins():
    w, stats = problem(n=32, k=64)
    fmt = parse_format("bilevel3-g16")
    losses = [loss(w, m.solve(w, stats, fmt).quantized, stats) for m in (RTN(), GPTQ(rounds=0), GPTQ(rounds=2))]
    assert losses[2] < losses[1] < 0.7 * losses[0]


def test_names_sizes_zeros_and_what_is_too_large():
    fmt = parse_format("bilevel3-g16")
    assert fmt == Bilevel(bits=3, group=16) and fmt.label == "bilevel3-g16" and not fmt.by_rows
    assert fmt.storage_bits(64, 128) == 64 * 128 * 3 + 64 * 2 * 24 + 4 * 8 * 64
    assert fmt.storage_bits(64, 512) / 64 / 512 == 3 + 6 / 16 + 64 / 256
    for w in (torch.zeros(4, 32), torch.full((4, 32), 0.375), torch.full((4, 32), -0.375)):
        assert torch.equal(matrix(fmt, w).decode(), w)
    with pytest.raises(NumericsError, match="bilevel3-g16 cannot store its scales in fp16"):
        fmt.fit(W * 1e8)
