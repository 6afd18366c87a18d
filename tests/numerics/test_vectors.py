"""Searches over codebooks against brute force over all their combinations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.formats._base import Format
from qtool.numerics.codebooks import batched_search, vector_search
from qtool.numerics.codebooks.codebook import NEIGHBORS
from qtool.numerics.codebooks.scale_rule import EFFORT
from qtool.numerics.codebooks.spans import fill_errors, forest_of, search_span
from qtool.numerics.codebooks.sphere import COST, NEVER, searcher
from qtool.numerics.codebooks.vector_snap import snap_vectors
from qtool.numerics.solving.vector_walk import descend_vectors, largest_first, write_codes
from tests.reference import close
from tests.reference.vectors import best_pair, best_span, cheapest, combinations

NAMES = ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


def load(name: str) -> Format:
    fmt: Format = registry.load("formats", name)()
    return fmt


def vectors(fmt: Format, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(targets [n, span], column weights [span], scales [n, 1] of either sign that suit them)."""
    g = torch.Generator().manual_seed(seed)
    book = fmt.codebook()
    assert book is not None
    weight = torch.randn(book.span, generator=g).mul(1.5).exp()
    size = float(np.median(book.magnitudes[book.entries])) if book.signs != "none" else 0.8
    scale = torch.rand(n, 1, generator=g).add(0.5) / size
    scale[::3] *= -1
    return torch.randn(n, book.span, generator=g), weight, scale


def best_in_span(x: Tensor, weight: Tensor, scale: float, fmt: Format) -> float:
    """Least weighted error of all codes of a span of one or two vectors."""
    book = fmt.codebook()
    assert book is not None
    if book.span == book.width:
        return best_span(x.double(), weight.double().diag(), scale, 0.0, fmt)[1]
    v, totals = book.width, []
    for parity in (0, 1):
        values = fmt.levels().double()[combinations(book, parity)] * scale
        parts = [cheapest(x[a : a + v].double(), weight[a : a + v].double().diag(), values)[1] for a in (0, v)]
        totals.append(sum(parts))
    return min(totals)


@pytest.mark.parametrize("name", NAMES)
def test_nearest_codes_equal_brute_force_and_close_ones_are_close(name: str) -> None:
    fmt = load(name)
    book = fmt.codebook()
    assert book is not None
    x, weight, scale = vectors(fmt, 24)
    params = (scale, torch.zeros_like(scale))
    exact, close = (snap_vectors(x, weight, params, book, count) for count in (0, NEIGHBORS))
    levels = fmt.levels().double()
    best = torch.tensor([best_in_span(x[i], weight, float(scale[i]), fmt) for i in range(len(x))])
    errors = [((x - levels[codes.long()] * scale).square() * weight).sum(1) for codes in (exact, close)]
    assert torch.allclose(errors[0], best.double(), rtol=1e-4)
    assert bool((errors[1] >= errors[0] * (1 - 1e-5)).all()) and errors[1].sum() <= 1.1 * errors[0].sum()


def triangular(span: int, seed: int) -> Tensor:
    """An upper triangular factor as GPTQ's walk has it, float32 [span, span]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * span, span, generator=g) @ (torch.eye(span) + torch.randn(span, span, generator=g) * 0.3)
    x *= torch.rand(span, generator=g).mul(1.5).exp()
    return torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True)


@pytest.mark.parametrize("name", NAMES)
def test_sphere_search_equals_brute_force(name: str) -> None:
    fmt = load(name)
    book = fmt.codebook()
    assert book is not None
    x, _, scale = vectors(fmt, 8, seed=1)
    levels, width = fmt.levels(), book.width
    natural, n = torch.arange(book.span), len(x)
    for i in range(n):
        factor, s, o = triangular(book.span, i), float(scale[i]), 0.1
        order = natural.view(-1, width).flip(1).flatten() if i % 2 else natural  # the second in reverse
        forest, state = forest_of(book, order.numpy()), searcher(width, book.span)
        state.targets[:, :n] = ((x - o) / scale).T.numpy()  # other rows beside it change nothing
        state.best[0, COST] = NEVER
        search_span(0, factor.numpy(), True, forest, state)
        cost, codes = state.best[0, COST, i] * s**2, np.zeros(book.span, np.uint8)
        write_codes(i, 0, forest, state.best, codes)
        state.levels[:, i] = levels.numpy()[codes]
        fill_errors(book.span, state)
        errors = state.errors[:, i] * np.float32(s)
        back = order.argsort()
        inverse = (factor.double().T @ factor.double())[back][:, back]
        target = x[i].double()[back]
        if book.span == width:
            expected, _ = best_span(target, torch.linalg.inv(inverse), s, o, fmt)
        else:
            expected = best_pair(target, inverse, s, o, fmt)
        assert torch.equal(torch.from_numpy(codes).long()[back], expected)
        miss = x[i].double() - (levels.double()[codes.astype(np.int64)] * s + o)
        fed = miss @ torch.linalg.inv(factor.double())
        assert torch.allclose(torch.from_numpy(errors).double(), fed, rtol=1e-3, atol=1e-4)
        assert float(cost) == pytest.approx(float(fed.square().sum()), rel=1e-3)


def mixed_gram() -> Tensor:
    """Of inputs that hang together, float32 [256, 256]."""
    g = torch.Generator().manual_seed(2)
    mixed = torch.randn(512, 256, generator=g) @ (torch.eye(256) + torch.randn(256, 256, generator=g) * 0.05)
    return mixed.T @ mixed


@pytest.mark.parametrize("name", ["iq1_m", *NAMES])
def test_scales_of_all_blocks_at_once_are_those_of_one_after_the_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_search.BlockBatch, "products", close.products)  # a kernel does it on devices
    fmt = load(name)
    g = torch.Generator().manual_seed(4)
    w = torch.randn(40, 512, generator=g) * torch.rand(512, generator=g)
    w[1], w[2, :256] = 0, 0
    weight = fmt.normalized(w, torch.rand(512, generator=g).exp())
    for search in ("fast", "default"):
        effort = EFFORT[search][fmt.rule.delta > 0]
        ratios = np.geomspace(fmt.rule.low, fmt.rule.high, effort.steps).astype(np.float32)
        rest = (fmt.codebook(), 256, fmt.rule)
        want = vector_search.vector_scales(w, weight, *rest, effort)
        found = batched_search.vector_scales(w, weight, *rest, ratios, effort)
        for a, b in zip(want[:3], found[:3], strict=True):
            assert (a != b).float().mean() <= 0.1  # where two are as good
        assert torch.allclose(want[3], found[3], atol=1e-5)


@pytest.mark.parametrize("name", ["iq1_m", "iq2_xxs", "iq2_s", "iq3_xxs"])
def test_descent_lowers_the_objective_to_where_no_span_can_improve_it(name: str) -> None:
    fmt = load(name)
    book = fmt.codebook()
    assert book is not None
    gram = mixed_gram()
    w = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    params = fmt.fit(w)
    codes = fmt.snap(w, params)
    pull = (w - fmt.decode(codes, params)) @ gram
    better, gradient = descend_vectors(gram, fmt.affine(params), fmt.levels(), book, codes, pull, 50)
    miss = (w - fmt.decode(better, params)).double()
    before = (w - fmt.decode(codes, params)).double()
    assert bool((((miss @ gram.double()) * miss).sum(1) < 0.9 * ((before @ gram.double()) * before).sum(1)).all())
    assert torch.allclose(gradient.double(), miss @ gram.double(), rtol=1e-3, atol=0.05)
    if book.span > book.width:
        return
    scale, offset = fmt.affine(params)
    for n, a in ((0, 0), (1, 96), (2, 248)):
        part, group = slice(a, a + book.span), a * scale.shape[1] // 256
        metric = gram[part, part].double()
        now = miss[n, part] @ metric @ miss[n, part]
        free = fmt.decode(better, params)[n, part].double() + miss[n] @ gram[:, part].double() @ torch.linalg.inv(
            metric
        )
        gap = free - fmt.decode(better, params)[n, part].double()
        _, best = best_span(free, metric, float(scale[n, group]), float(offset[n, group]), fmt)
        assert gap @ metric @ gap <= best * 1.001 + 1e-9, now


def test_columns_of_a_vector_stay_together_the_largest_first() -> None:
    order, places = largest_first(torch.tensor([1.0, 3.0, 2.0, 3.0, 9.0, 5.0, 6.0, 7.0]), 4)
    assert order.tolist() == [1, 3, 2, 0, 4, 7, 6, 5]
    assert order[places].tolist() == list(range(8))
