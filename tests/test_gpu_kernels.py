"""Kernels on a CUDA device against those of the CPU and plain loops: small shapes, ragged edges, dead groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.formats._spelling import parse_format
from qtool.methods.gptq import GPTQ, activation_order, by_column
from qtool.numerics.codebooks.batched_search import BlockBatch
from qtool.numerics.grids import minifloat
from qtool.numerics.scales import search
from qtool.numerics.solving import gram as sums
from qtool.numerics.solving import kquant_refit
from qtool.numerics.solving.descent import descend
from qtool.numerics.solving.linalg import inverse_factor
from qtool.numerics.solving.normal import normal_equations, per_group
from qtool.numerics.solving.split import Split
from qtool.numerics.solving.vector_walk import descend_vectors, walk_vector_block
from qtool.numerics.solving.walk import searches, walk, walk_searching
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram
from tests.methods.test_refine import descend_slowly, gram_of
from tests.reference import close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LEVELS = {
    "integers": torch.arange(-8.0, 8.0),
    "floats": torch.tensor([-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
    "uneven": torch.tensor([-1.25, -0.25, 0.75]),
}


def objective(d: Tensor, gram: Tensor) -> Tensor:
    """Of each row, float64 [N]."""
    d, gram = d.double().cpu(), gram.double().cpu()
    return ((d @ gram) * d).sum(1)


def walk_slowly(w: Tensor, factor: Tensor, levels: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """A column after the other in float64; scale and offset [N, K]."""
    rest, codes = w.double().clone(), torch.empty(w.shape, dtype=torch.uint8)
    for j in range(w.shape[1]):
        grid = scale[:, j : j + 1].double() * levels.double() + offset[:, j : j + 1].double()
        codes[:, j] = (rest[:, j : j + 1] - grid).abs().argmin(1)
        error = (rest[:, j] - grid.gather(1, codes[:, j : j + 1].long())[:, 0]) / factor[j, j].double()
        rest -= error[:, None] * factor[j].double()
    return codes


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (37, 40), (50, 320)])
def test_walk(n: int, k: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(k)
    levels, gram = LEVELS[kind], gram_of(k, 2 * k)
    factor, _ = inverse_factor(gram, 0.01)
    w = torch.randn(n, k, generator=generator)
    scale, offset = 0.1 + torch.rand(n, k, generator=generator), 0.1 * torch.randn(n, k, generator=generator)
    parameters = {d: (scale.T.contiguous().to(d), offset.T.contiguous().to(d)) for d in ("cpu", "cuda")}

    def solved(device: str) -> Tensor:
        s, o = parameters[device]
        return walk(w.to(device), factor.to(device), levels, 40, lambda a, b, _: (s[a:b], o[a:b])).cpu()

    found, want = solved("cuda"), walk_slowly(w, factor, levels, scale, offset)
    assert (found != want).any(1).float().mean() <= 0.1  # a tie in float32 changes its row
    errors = [objective(w - (scale * levels[codes.long()] + offset), gram) for codes in (found, solved("cpu"))]
    assert errors[0].sum() <= 1.01 * errors[1].sum()


FLOATS = ["nvfp4", "mxfp4", "mxfp8"]
INTEGERS = ["nvint4", "mxint8", "int4-g32", "int3-g64-asym", "int2-g16", "int8-g64"]


@pytest.mark.parametrize("label", FLOATS + INTEGERS)
def test_scales_are_searched_in_the_walk(label: str) -> None:
    generator = torch.Generator().manual_seed(7)
    n, k = 37, 320
    w = torch.randn(n, k, generator=generator) * torch.rand(k, generator=generator)
    w[3], w[5, 64:192] = 0, 0
    fmt = parse_format(label)
    fmt = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    rule = fmt.on_the_way().search_in_walk()
    assert rule is not None
    assert searches(rule)
    gram, width = gram_of(k, 2 * k), rule.columns
    factor, _ = inverse_factor(gram, 0.01)
    weight = factor.diagonal().square().reciprocal()
    codes, parts = walk_searching(w.cuda(), factor.cuda(), fmt.levels(), rule, weight.cuda())
    codes, found = codes.cpu(), {name: p.cpu() for name, p in fmt.of_search(*parts).items()}
    fitted = []

    def parameters(a: int, b: int, current: Tensor) -> tuple[Tensor, Tensor]:
        fitted.append(fmt.on_the_way().fit(current.contiguous(), weight[a:b]))
        scale, offset = fmt.affine(fitted[-1])
        return scale.T.expand(b - a, -1), offset.T.expand(b - a, -1)

    want, params = walk(w, factor, fmt.levels(), width, parameters), fmt.join(fitted)
    assert found.keys() == params.keys()
    # sums in another order choose another scale here and there, of many that are as good for integers, and change all
    # that comes behind in its row; the first group has nothing before it
    first = slice(0, width), slice(0, 1)
    many, groups = label in INTEGERS, k // width
    assert (codes[:, first[0]] != want[:, first[0]]).any(1).float().mean() <= 0.2
    assert (codes != want).any(1).float().mean() <= (1 - 0.8**groups if many else 0.1)  # a fifth in each group
    for name, p in params.items():
        assert (found[name][:, first[1]] != p[:, first[1]]).float().mean() <= 0.2
        assert (found[name] != p).float().mean() <= (0.3 if many else 0.02)
    errors = [objective(w - fmt.decode(c, p), gram).sum() for c, p in ((codes, found), (want, params))]
    assert errors[0] <= 1.01 * errors[1]


def test_products_of_halves() -> None:
    generator = torch.Generator().manual_seed(9)
    matrix, x = torch.randn(96, 96, generator=generator), torch.randn(16, 33, generator=generator)
    total = torch.randn(40, 33, generator=generator)
    want = total.double() - matrix[8:48, 16:32].double() @ x.double()
    found = total.cuda()
    Split(matrix.cuda()).subtract(found, slice(8, 48), slice(16, 32), x.cuda())
    torch.testing.assert_close(found.double().cpu(), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(("n", "k", "groups"), [(3, 24, 3), (21, 80, 5), (400, 288, 9)])
def test_descent(n: int, k: int, groups: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(k)
    levels, gram, w = LEVELS[kind], gram_of(k, 2 * k), torch.randn(n, k, generator=generator)
    scale = 0.1 + 0.3 * torch.rand(n, groups, generator=generator)
    scale[0, 0], scale[1] = 0.0, -scale[1]
    codes = torch.randint(0, len(levels), (n, k), generator=generator).to(torch.uint8)
    wide = scale.repeat_interleave(k // groups, 1)
    pull = (w - levels[codes.long()] * wide) @ gram
    device = Split(gram.cuda()), scale.cuda()
    found, left = (t.cpu() for t in descend(*device, levels, codes.cuda(), pull.cuda(), 3))
    want = descend(Split(gram), scale, levels, codes, pull, 3)[0]
    assert (found != want).float().mean() <= 0.01
    assert torch.equal(found[wide == 0], codes[wide == 0])
    errors = [objective(w - levels[c.long()] * wide, gram).sum() for c in (found, want)]
    assert errors[0] <= errors[1] * (1 + 1e-4)
    pull = (w - levels[found.long()] * wide) @ gram
    torch.testing.assert_close(
        left, pull, rtol=1e-3, atol=1e-4 * float(gram.abs().max())
    )  # it is kept up to date in 16 bits
    if n == 3:
        assert torch.equal(found[1:], descend_slowly(gram, scale, levels, codes, w, 3)[1:])


def weighted_error(fmt: object, w: Tensor, importance: Tensor | None) -> Tensor:
    """What the search of a format leaves, float64 [N]."""
    params = fmt.on_the_way().fit(w, importance)  # type: ignore[attr-defined]
    error = (fmt.decode(fmt.snap(w, params), params) - w).double().square()  # type: ignore[attr-defined]
    return (error if importance is None else error * importance).sum(1).cpu()


SEARCHED = "int4-g32 int3-g64-asym int8-channel biased4-g64 nvfp4 mxfp4 mxfp8 q2_k q3_k q4_k q5_k q6_k"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", SEARCHED.split())
def test_searches_leave_as_little(label: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(37, 768, generator=generator) * torch.rand(768, generator=generator)
    w[3], w[5, 256:512] = 0, 0
    importance = torch.rand(768, generator=generator).pow(4) if weighted else None
    fmt = parse_format(label)
    fmt = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    want = weighted_error(fmt, w, importance)
    found = weighted_error(fmt, w.cuda(), importance.cuda() if weighted else None)
    assert found[3] == want[3]
    turns = label.endswith("_k")  # alternations of steps and integers, which end elsewhere if one choice tips over
    torch.testing.assert_close(found, want, rtol=0.05 if turns else 2e-3, atol=1e-9)
    assert float(found.sum()) <= float(want.sum()) * (1 + (3e-3 if turns else 1e-4))


@pytest.mark.parametrize("grid", [(2, 1), (4, 3), (5, 2), (2, 3)])
def test_rounding_to_floats(grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, scale = torch.randn(7, 64, generator=generator) * 10, torch.rand(7, 4, generator=generator)
    scale[0, 0] = 0
    found = minifloat.nearest_levels(x.cuda(), scale.cuda(), minifloat.minifloat(*grid))
    assert torch.equal(found.cpu(), minifloat.nearest_levels(x, scale, minifloat.minifloat(*grid)))


@pytest.mark.parametrize(("minima", "groups", "limits"), [(True, 16, (0, 63)), (False, 48, (-32, 31))])
def test_two_level_parameters_settle_alike(minima: bool, groups: int, limits: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(groups)
    size = groups * (1 + minima)
    x = torch.randn(9, 2 * size, size, generator=generator)
    curvature = x.mT @ x + 0.01 * torch.eye(size)
    steps = [(torch.rand(9, groups // 8, generator=generator) * 0.01).half().float() for _ in range(2)]
    integers = [torch.randint(*limits, (9, groups), generator=generator).float() for _ in range(2)]
    pull = 3 * torch.randn(9, size, generator=generator)
    want = kquant_refit.refit_multiples(curvature, pull, (*steps, *integers), limits)
    moved = [p.cuda() for p in (*steps, *integers)]
    found = kquant_refit.refit_multiples(curvature.cuda(), pull.cuda(), tuple(moved), limits)  # type: ignore[arg-type]
    same = torch.stack([(a.cpu() == b).all(1) for a, b in zip(found[:3], want[:3], strict=True)]).all(0)
    assert same.float().mean() >= 0.7  # sums in another order tip a move, and with it those behind it
    torch.testing.assert_close(found[0].cpu(), want[0], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(3, 24, 3), (67, 96, 6), (70, 320, 10), (5, 192, 3), (5, 20, 1)])
def test_normal_equations(n: int, k: int, groups: int, offsets: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    levels, pull = torch.randint(-7, 8, (n, k), generator=generator).float(), torch.randn(n, k, generator=generator)
    gram = gram_of(k, 3 * k)
    want = normal_equations(levels, gram, pull, groups, per_group(gram, groups) if offsets else None)
    moved = gram.cuda()
    extra = per_group(moved, groups) if offsets else None
    found = normal_equations(levels.cuda(), moved, pull.cuda(), groups, extra)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=3e-6 * float(b.abs().max()))  # sums cancel


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("label", ["int4-g32", "int4-g128", "int3-g64-asym"])
def test_several_matrices_as_one_by_one(label: str, rounds: int) -> None:
    """Products of several matrices at a time are rounded otherwise: codes differ at ties, objectives hardly."""
    fmt, method, (m, n, k) = parse_format(label), GPTQ(rounds=rounds, drift=0), (5, 128, 384)
    statistics, w = [], torch.randn(m, n, k, generator=torch.Generator().manual_seed(7)).cuda()
    for i in range(m):
        stats = InputStats(k, frozenset({Gram}), "cuda")
        stats[Gram].matrix = gram_of(k, 2 * k + i).cuda()
        statistics.append(stats)
    together = method.solve_abreast(w, statistics, fmt)
    assert together is not None
    for i, stats in enumerate(statistics):
        found, alone = together.rows(i * n, (i + 1) * n), method.solve(w[i], stats, fmt).quantized
        left, least = (objective(w[i] - q.decode(), stats[Gram].matrix) for q in (found, alone))
        assert (found.codes == alone.codes).float().mean() > 0.98
        assert left.sum() == pytest.approx(float(least.sum()), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [3, 300])
def test_gram_matrices(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(500, k, generator=generator).to(dtype)
    found = sums.GramSum(k, "cuda")
    for part in (x[:200], x[200:200], x[200:]):
        found.add(part.cuda())
    want = x.double().T @ x.double()
    torch.testing.assert_close(found.total().double().cpu(), want, rtol=1e-5, atol=1e-2)


def test_weights_of_searches_are_those_of_the_cpu() -> None:
    importance = torch.rand(64, generator=torch.Generator().manual_seed(0)).pow(4)
    importance[:16] = 0
    for a, b in zip(
        search.weights(torch.zeros(1, 64).cuda(), importance.cuda(), 16),
        search.weights(torch.zeros(1, 64), importance, 16),
        strict=True,
    ):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("label", ["iq1_m", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s"])
def test_products_of_close_codes(label: str) -> None:
    fmt, generator = parse_format(label), torch.Generator().manual_seed(5)
    book = fmt.codebook()
    assert book is not None
    groups, segments = 256 // fmt.rule.group, fmt.rule.group // fmt.rule.segment
    shape = (9, groups, segments, fmt.rule.segment // book.span, book.span // book.width, book.width)
    x, weight = torch.randn(shape, generator=generator), torch.rand(1, *shape[1:], generator=generator)
    scale = torch.randn(9, groups, generator=generator).div(8)
    scale[0, 0] = 0
    shift = fmt.rule.delta * torch.ones(9, groups, segments) if fmt.rule.delta else 0.0
    for near in (3, 16):
        want = close.products(BlockBatch(x, weight, fmt.rule, book, near), scale, shift)
        there = BlockBatch(x.cuda(), weight.cuda(), fmt.rule, book, near)
        found = there.products(scale.cuda(), shift.cuda() if isinstance(shift, Tensor) else shift)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


VECTORS = ["iq1_m", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s"]


def on_device(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.cuda() for name, p in params.items()}


@pytest.mark.parametrize("label", VECTORS)
def test_walk_of_vectors(label: str) -> None:
    """Block by block, as the walk calls it; on the CPU the nearest vectors are found by another search."""
    fmt, gram = parse_format(label), gram_of(256, 512)
    book = fmt.codebook()
    assert book is not None
    w = torch.randn(37, 256, generator=torch.Generator().manual_seed(3))
    order = activation_order(gram.diagonal(), (book.width, book.span))
    factor, _ = inverse_factor(gram[order][:, order], 0.01)
    scale, offset = (by_column(p, order, 256).T.contiguous() for p in fmt.affine(fmt.fit(w)))
    given = (w[:, order].contiguous(), factor, scale, offset)
    want, want_error = walk_vector_block(*given, fmt.levels(), book, order)
    found, error = walk_vector_block(*(t.cuda() for t in given), fmt.levels(), book, order.cuda())
    same = (found.cpu() == want).all(1)
    assert same.float().mean() >= 0.9  # a tie changes all that comes behind it
    torch.testing.assert_close(error.cpu()[same], want_error[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("label", VECTORS)
def test_descent_of_vectors(label: str) -> None:
    fmt, gram = parse_format(label), gram_of(512, 1024)
    book = fmt.codebook()
    assert book is not None
    w = torch.randn(21, 512, generator=torch.Generator().manual_seed(3))
    params = fmt.fit(w)
    codes = fmt.snap(w, params)
    pull = (w - fmt.decode(codes, params)) @ gram
    want, _ = descend_vectors(gram, fmt.affine(params), fmt.levels(), book, codes, pull, 2)
    there = tuple(p.cuda() for p in fmt.affine(params))
    found, left = descend_vectors(gram.cuda(), there, fmt.levels(), book, codes.cuda(), pull.cuda(), 2)
    miss = w - fmt.decode(found.cpu(), params)
    torch.testing.assert_close(left.cpu(), miss @ gram, rtol=1e-3, atol=1e-3 * float(pull.abs().max()))
    ours, theirs = objective(miss, gram), objective(w - fmt.decode(want, params), gram)
    assert (found.cpu() != want).any(1).float().mean() <= 0.2
    assert ours.sum() <= 1.001 * theirs.sum()


@pytest.mark.parametrize("label", VECTORS)
def test_vectors(label: str) -> None:
    """The whole of GPTQ, where a difference in the last bit of a scale may change all that comes behind it."""
    k, fmt = 512, parse_format(label)
    w = torch.randn(64, k, generator=torch.Generator().manual_seed(3))
    stats = InputStats(k, frozenset({Gram}))
    stats.add(torch.randn(2 * k, k, generator=torch.Generator().manual_seed(4)) @ gram_of(k, 2 * k).div(k))
    method = GPTQ(drift=0)
    want = method.solve(w, stats, fmt).quantized
    gram = stats[Gram].matrix
    there = InputStats(k, frozenset({Gram}), "cuda")
    there.add(torch.linalg.cholesky(gram.double()).mT.float().cuda())
    found = method.solve(w.cuda(), there, fmt).quantized
    ours = objective(w - fmt.decode(found.codes.cpu(), {n: p.cpu() for n, p in found.params.items()}), gram).sum()
    assert ours <= 1.005 * objective(w - want.decode(), gram).sum()
    snapped = fmt.snap(w.cuda(), on_device(want.params)).cpu()
    assert (snapped != fmt.snap(w, want.params)).float().mean() <= 1e-3
