"""What all rows need of an input, found by two processes together, against what one finds alone."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qtool.formats.int import Int
from qtool.methods import gptq
from qtool.methods.gptq import GPTQ
from qtool.numerics.solving.linalg import inverse_factor, invert_lower, invert_together
from qtool.numerics.threads.ranks import ALONE
from qtool.stats._base import InputStats
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram

FORMAT = Int(bits=4, group=32)


def gram(k):
    x = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(k)) * torch.linspace(0.5, 2, k)
    return x.T @ x


def inverted(ranks, k):
    lower = torch.linalg.cholesky(gram(k))
    return invert_together(lower, ranks), inverse_factor(gram(k), 0.01, ranks)


@pytest.mark.parametrize("k", [2, 3, 129, 300])
def test_halves_are_inverted_by_two(k, together):
    (first, (factor, damp)), (second, (same, _)) = together(inverted, k)
    assert torch.equal(first, second)
    assert torch.equal(factor, same)
    assert torch.equal(first, first.tril())
    assert_close(first, invert_lower(torch.linalg.cholesky(gram(k))), rtol=1e-4, atol=1e-5)
    alone, wanted = inverse_factor(gram(k), 0.01)
    assert_close(factor, alone, rtol=1e-4, atol=1e-5)
    assert damp == wanted


def measured(kinds, scale=1.0):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    stats = InputStats(64, kinds)
    stats.add(x * scale, x * scale + 0.2 * x.flip(1) if Drift in kinds else None)
    return stats


def prepared(ranks, kinds, scale):
    """What is there before a row is solved, and the rows solved then; how often this process factorized."""
    gptq.TOGETHER, counts, stats = 1, {"inverse_factor": 0, "ridge": 0}, measured(kinds, scale)
    real = {name: getattr(gptq, name) for name in counts}

    def counted(name):
        def call(*args):
            counts[name] += 1
            return real[name](*args)

        return call

    try:
        for name in counts:
            setattr(gptq, name, counted(name))
        method = GPTQ()
        if ranks.size > 1:
            method.prepare_together(stats, FORMAT, ranks)
            method.prepare_together(stats, FORMAT, ranks)
        found = {key: value for key, value in stats.cache.items() if not isinstance(value, Exception)}
        method.prepare(stats, FORMAT)
        w = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
        return found, method.solve(w, stats, FORMAT).quantized.decode(), counts
    finally:
        gptq.TOGETHER = 2048
        for name, function in real.items():
            setattr(gptq, name, function)


@pytest.mark.parametrize("kinds", [{Gram}, {Gram, Drift}], ids=["gram", "drift"])
def test_what_rows_need_is_the_same_in_both(kinds, together):
    (first, w, own), (second, same, other) = together(prepared, frozenset(kinds), 1.0)
    _, alone, once = prepared(ALONE, frozenset(kinds), 1.0)
    assert torch.equal(w, same)
    assert_close(w, alone, rtol=1e-3, atol=1e-4)
    assert first.keys() == second.keys()
    assert len(first) == len(kinds)
    for a, b in ((value, second[key]) for key, value in first.items()):
        for x, y in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b], strict=True):
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))
    if Drift in kinds:
        assert (own, other) == ({"inverse_factor": 1, "ridge": 0}, {"inverse_factor": 0, "ridge": 1})
        assert once == {"inverse_factor": 1, "ridge": 1}
        reference = measured(frozenset(kinds))
        assert_close(first["drift", 0.3], GPTQ()._back(reference), rtol=1e-3, atol=1e-5)


def test_a_matrix_that_cannot_be_factorized_is_told_by_each(together):
    (first, w, _), (second, same, _) = together(prepared, frozenset({Gram, Drift}), float("inf"))
    assert torch.equal(w, same)
    assert len(first) == len(second) == 1
