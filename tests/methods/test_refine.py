"""Rounds of closed-form scales and coordinate descent: against slow loops, and on wide matrices."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._spelling import parse_format
from qtool.methods._refine import refine
from qtool.methods.rtn import RTN
from qtool.numerics.solving.descent import descend
from qtool.numerics.solving.split import Split


def gram_of(k: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k) * 0.5
    x = torch.randn(tokens, k, generator=generator) @ mix
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return gram


def descend_slowly(gram, scale, levels, codes, w, sweeps):  # type: ignore[no-untyped-def]
    """One row at a time in float64: every code in turn takes the level that leaves the least error, all told."""
    codes, gram, levels = codes.clone().long(), gram.double(), levels.double()
    width = codes.shape[1] // scale.shape[1]
    for n in range(len(codes)):
        for _ in range(sweeps):
            for j in range(codes.shape[1]):
                s = scale[n].double().repeat_interleave(width)
                tries = levels[codes[n]].repeat(len(levels), 1)
                tries[:, j] = levels
                d = w[n].double() - s * tries
                codes[n, j] = ((d @ gram) * d).sum(1).argmin()
    return codes.to(torch.uint8)


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("levels", [torch.arange(-4.0, 4.0), torch.tensor([-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0])])
@pytest.mark.parametrize("k", [8, 40, 66])
def test_descent_is_that_of_the_slow_loop(k: int, levels: torch.Tensor, sweeps: int) -> None:
    generator = torch.Generator().manual_seed(k)
    gram, w = gram_of(k, 2 * k), torch.randn(5, k, generator=generator)
    scale = 0.3 + 0.1 * torch.rand(5, 2, generator=generator)
    scale[1, 0], scale[2, 1] = 0.0, -0.4
    codes = torch.randint(0, len(levels), (5, k), generator=generator).to(torch.uint8)
    decoded = levels[codes.long()] * scale.repeat_interleave(k // 2, 1)
    found, pull = descend(Split(gram), scale, levels, codes, (w - decoded) @ gram, sweeps)
    want = descend_slowly(gram, scale, levels, codes, w, sweeps)
    alive = scale.repeat_interleave(k // 2, 1) != 0
    assert torch.equal(found[alive], want[alive])
    assert torch.equal(found[~alive], codes[~alive])
    decoded = levels[found.long()] * scale.repeat_interleave(k // 2, 1)
    torch.testing.assert_close(pull, (w - decoded) @ gram, rtol=1e-3, atol=1e-3 * float(gram.diagonal().mean()))


@pytest.mark.parametrize("name", ["q4_k", "q4_1"])
def test_wide_matrices_are_refined_on_several_threads(name: str) -> None:
    """Hundreds of parameters in each row's equations."""
    k, generator = 4096, torch.Generator().manual_seed(3)
    diagonal = torch.rand(k, generator=generator).exp()
    x = torch.randn(64, k, generator=generator) * diagonal.sqrt()
    gram = x.T @ x / 64 + torch.diag(diagonal)
    w, fmt = torch.randn(20, k, generator=generator), parse_format(name)
    start = RTN().solve(w, None, fmt).quantized
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = refine(w, Split(gram), start, 1, 2)
    finally:
        torch.set_num_threads(threads)
    before, after = (q.decode() - w for q in (start, found))
    errors = [float(((d @ gram) * d).sum()) for d in (before, after)]
    assert errors[1] < 0.9 * errors[0]
