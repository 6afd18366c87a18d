"""Rounds of closed-form scales and coordinate descent: against slow loops, and on wide matrices."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from qtool.formats._base import Quantized
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


@pytest.mark.parametrize("name", ["int3-g16", "int4-g16-asym", "biased2-g16"])
def test_parameters_are_those_of_least_squares_for_their_codes(name: str) -> None:
    """Row by row in float64: the best of all scales, and offsets where they are free, in the metric of the inputs."""
    gram, w = gram_of(48, 200), torch.randn(7, 48, generator=torch.Generator().manual_seed(5))
    fmt = parse_format(name).model_copy(update={"scale_dtype": "fp32"})
    start = RTN().solve(w, None, fmt).quantized
    scale, offset = fmt.affine(start.params)
    far = Quantized(start.codes, fmt.refit(start.params, 1.5 * scale, 1.5 * offset), fmt)
    found = refine(w, Split(gram), far, 1, 0)
    assert torch.equal(found.codes, start.codes)
    zero = offset / scale  # an offset that is not free is a multiple of the scale
    for n in range(len(w)):
        columns = torch.zeros(48, 6 if fmt.free_offset else 3, dtype=torch.float64)
        for j in range(48):
            level = float(fmt.levels()[int(start.codes[n, j])])
            columns[j, j // 16] = level if fmt.free_offset else level + float(zero[n, j // 16])
            if fmt.free_offset:
                columns[j, 3 + j // 16] = 1
        h = gram.double()
        best = torch.linalg.solve(columns.T @ h @ columns, columns.T @ h @ w[n].double())
        mine = torch.cat([p[n] for p in fmt.affine(found.params)[: 1 + fmt.free_offset]])
        torch.testing.assert_close(mine.double(), best, rtol=1e-3, atol=1e-4)


def test_rows_take_what_storage_makes_of_the_best_parameters_only_if_that_is_better() -> None:
    """From scales near to the best that bfloat16 holds: least squares rounded one by one are often worse than these."""
    gram, w = gram_of(48, 60).double(), torch.randn(60, 48, generator=torch.Generator().manual_seed(5)).double()
    fmt = parse_format("int2-g16").model_copy(update={"scale_dtype": "bf16"})
    start = RTN().solve(w.float(), None, fmt).quantized
    levels = fmt.levels().double()[start.codes.long()].view(60, 3, 16)

    def error(n: int, scale: torch.Tensor) -> float:
        apart = (levels[n] * scale.double().view(3, 1)).flatten() - w[n]
        return float(apart @ gram @ apart)

    first, want, taken = torch.empty(60, 3), torch.empty(60, 3), 0
    moves = list(product((-1, 0, 1), repeat=3))
    for n in range(60):
        columns = torch.block_diag(*levels[n]).T
        best = torch.linalg.solve(columns.T @ gram @ columns, columns.T @ gram @ w[n]).bfloat16()
        near = [(best.view(torch.int16) + torch.tensor(m, dtype=torch.int16)).view(torch.bfloat16) for m in moves]
        first[n] = min(near, key=lambda scale: error(n, scale)) if n % 2 else near[n % 27]
        better = error(n, best) < error(n, first[n])
        want[n] = best if better else first[n]
        taken += better
    assert 10 < taken < 50
    stored = fmt.refit(start.params, first, torch.zeros(60, 3))
    assert torch.equal(fmt.affine(stored)[0], first)
    found = refine(w.float(), Split(gram.float()), Quantized(start.codes, stored, fmt), 1, 0)
    assert torch.equal(fmt.affine(found.params)[0], want)
