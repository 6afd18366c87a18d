"""Codes and corrections by turns: what is left falls, and is what the result really leaves."""

from __future__ import annotations

import pytest
import torch

from qtool.formats.int import Int
from qtool.methods._base import Solution
from qtool.methods.rtn import RTN
from qtool.numerics.metrics import energy
from qtool.pipeline.correct import correct, joined
from qtool.residuals._base import Matrix
from qtool.residuals.low_rank import LowRank
from qtool.residuals.sparse import Sparse

FMT = Int(bits=3, group=16)


@pytest.fixture
def w():
    """A few outliers, which spoil the scales of their groups."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(32, 64, generator=generator)
    w[torch.rand(w.shape, generator=generator) < 0.01] *= 12
    return w


@pytest.fixture
def gram():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return x.T @ x


def solve(w):
    """In two parts."""
    return [RTN().solve(part, None, FMT) for part in w.split(20)]


def left(w, solution, corrections, gram):
    return energy(w - Matrix(solution.quantized, corrections).decode(), gram)


@pytest.mark.parametrize("residuals", [(Sparse(share=0.02),), (LowRank(rank=4), Sparse(share=0.02))], ids=len)
def test_turns_help_as_long_as_they_are_taken(residuals, w, gram):
    found = {turns: correct(residuals, w, gram, joined(solve(w)), solve, turns) for turns in (0, 1, 2, 8)}
    costs = {turns: left(w, *result, gram) for turns, result in found.items()}
    assert energy(w - joined(solve(w)).quantized.decode(), gram) > costs[0] >= costs[1] >= costs[2] >= costs[8]
    assert costs[8] < 0.99 * costs[0]
    first, corrections = found[0]
    assert torch.equal(first.quantized.codes, joined(solve(w)).quantized.codes)
    error = w - first.quantized.decode()
    for residual, correction in zip(residuals, corrections, strict=True):
        expected = residual.fit(error, gram)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in correction.tensors.items())
        error = error - residual.apply(torch.zeros_like(w), expected)


def test_what_is_made_up_for_is_the_error_against_the_methods_target(w, gram):
    target = w + 0.1
    solution = Solution(RTN().solve(target, None, FMT).quantized, "why", target)
    found, (correction,) = correct((LowRank(rank=32, dtype="fp32"),), w, gram, solution, solve, 0)
    assert (found.fallback, found.target is target) == ("why", True)
    torch.testing.assert_close(correction.apply(found.quantized.decode()), target, rtol=0, atol=1e-4)
