"""Codes beside the codes: against slow loops, all of them and chosen ones, and two planes found together."""

from __future__ import annotations

import itertools

import pytest
import torch

from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.methods.rtn import RTN
from qtool.numerics.solving.planes import RIDGE, pair_codes, pair_scales
from qtool.pipeline.correct import correct
from qtool.problems import Mistakes
from qtool.residuals._base import Correction, Matrix, Residual
from qtool.residuals.codes import STARTS, Codes

N, K = 10, 96
W = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.05
TRITS, BITS = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0])


def gram() -> torch.Tensor:
    x = torch.randn(300, K, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, K)
    return x.T @ x


def rounded(w: torch.Tensor, label: str) -> torch.Tensor:
    return RTN().solve(w, None, parse_format(label)).quantized.decode()


def test_all_of_the_error_rounded_again_is_what_the_format_makes_of_it():
    error = W - rounded(W, "int2-g32")
    codes = Codes(format="int2-g32")
    added = codes.apply(torch.zeros_like(W), codes.fit(error, None))
    assert torch.equal(added, rounded(error, "int2-g32"))
    assert codes.needs == frozenset()
    assert codes.storage_bits(N, K) == parse_format("int2-g32").storage_bits(N, K)


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("unit", ["row", 32])
def test_chosen_units_are_those_that_a_loop_finds(unit, sensitive):
    error, h = W - rounded(W, "int2-g32"), gram() if sensitive else None
    codes = Codes(format="int3-g16", share=0.3, unit=unit, sensitive=sensitive)
    tensors = codes.fit(error, h)
    width = K if unit == "row" else 32
    weight = torch.ones(K) if h is None else h.diagonal()
    costs = {}
    for n in range(N):
        for a in range(0, K, width):
            costs[n, a] = sum(float(error[n, j]) ** 2 * float(weight[j]) for j in range(a, a + width))
    kept = sorted(costs, key=costs.__getitem__, reverse=True)[: round(0.3 * len(costs))]
    wanted = torch.zeros_like(W)
    for n, a in kept:
        wanted[n, a : a + width] = rounded(error[n : n + 1, a : a + width], "int3-g16")[0]
    assert torch.equal(codes.apply(torch.ones_like(W), tensors) - 1, (wanted + 1) - 1)
    infos = codes.infos(N, K)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == infos
    bitmap = N * 8 * -(-(K // width) // 8)
    assert codes.storage_bits(N, K) == parse_format("int3-g16").storage_bits(len(kept), width) + bitmap
    codes.check(tensors, N, K)


@pytest.mark.parametrize("residual", [Codes(), Codes(format="int2-g32", share=0.4, unit=32), Codes(share=0.3)])
def test_rows_are_those_of_the_whole(residual):
    start = Quantized(torch.zeros(N, K, dtype=torch.uint8), {"scale": torch.zeros(N, 3)}, parse_format("int2-g32"))
    if residual.format.label == "ternary-g64":
        residual = residual.model_copy(update={"format": parse_format("ternary-g32")})
    matrix = Matrix(start, (Correction(residual, residual.fit(W, None)),))
    whole = matrix.decode()
    assert float(whole.abs().max()) > 0
    for a, b in ((0, 1), (3, 7), (0, N), (7, N)):
        assert torch.equal(matrix.rows(a, b).decode(), whole[a:b])
        matrix.rows(a, b).decode()


def test_damage_is_refused():
    residual = Codes(format="ternary-g32", share=0.4, unit=32)
    tensors = dict(residual.fit(W, None))
    with pytest.raises(ValueError, match="chosen: wanted 12 units, found 11"):
        flipped = tensors["chosen"].clone()
        row = int(flipped.flatten().nonzero()[0])
        flipped[row] &= flipped[row] - 1
        residual.check(tensors | {"chosen": flipped}, N, K)
    with pytest.raises(ValueError, match="codes: wanted codes below 3, found 3"):
        residual.check(tensors | {"codes": tensors["codes"] | 3}, N, K)
    assert (
        Codes(format="int2-g32", share=0.5, unit=40).misfit(N, K)
        == "rows of 96 columns are not divisible into units of 40"
    )
    assert "not divisible by 64" in (Codes().misfit(N, K) or "")


def pairs_slowly(x: torch.Tensor, levels: tuple[torch.Tensor, torch.Tensor], turns: int) -> tuple[float, list[float]]:
    """(error, scales) of one group, float64: every start, every weight, every pair."""
    size = float(x.square().mean().sqrt())
    v, best = (x.double() / size).tolist(), (float("inf"), [0.0, 0.0])
    pairs = list(itertools.product(*(p.tolist() for p in levels)))
    for a, b in STARTS:
        before = float("inf")
        for _ in range(turns):
            error, basis = 0.0, []
            for value in v:
                misses = [(value - a * t - b * s) ** 2 for t, s in pairs]
                t, s = pairs[misses.index(min(misses))]
                error += (value - a * t - b * s) ** 2
                basis.append([t, s])
            if not error < before * 0.99999:
                break
            before, t = error, torch.tensor(basis, dtype=torch.float64)
            ridge = float(RIDGE) * len(v)
            right = t.T @ torch.tensor(v, dtype=torch.float64) + ridge * torch.tensor([a, b])
            a, b = torch.linalg.solve(t.T @ t + ridge * torch.eye(2, dtype=torch.float64), right).tolist()
        if before < best[0]:
            best = before, [a * size, b * size]
    return best[0] * size**2, best[1]


@pytest.mark.parametrize("levels", [(TRITS, TRITS), (BITS, BITS)], ids=["trits", "bits"])
def test_two_planes_are_those_of_the_plain_loop(levels):
    x = W.reshape(-1, 32)
    scales = pair_scales(x, levels, STARTS, 30)
    codes = pair_codes(x, scales, levels)
    found = scales[:, :1] * levels[0][codes[0].long()] + scales[:, 1:] * levels[1][codes[1].long()]
    errors = (x - found).square().sum(1)
    wanted = torch.tensor([pairs_slowly(row, levels, 30)[0] for row in x])
    assert float((errors / wanted - 1).abs().median()) < 1e-3
    assert float(errors.sum() / wanted.sum()) == pytest.approx(1, abs=1e-2)
    for m in range(len(x)):
        basis = torch.stack([p[c.long()] for p, c in zip(levels, codes[:, m], strict=True)], dim=1).double()
        best = torch.linalg.lstsq(basis, x[m, :, None].double()).solution[:, 0]
        assert torch.allclose(scales[m].double(), best, rtol=2e-3, atol=1e-6)


def planes(table: str, joint: int) -> float:
    fmt, residual = parse_format(f"{table}-g32"), Codes(format=f"{table}-g32", joint=joint)
    solution, found = correct([residual], W, None, RTN().solve(W, None, fmt), lambda rest: [], 0)
    return float((W - found[0].apply(solution.quantized.decode())).square().sum())


def test_planes_found_together_are_better_than_one_behind_the_other():
    three_bits = float((W - rounded(W, "int3-g32")).square().sum())
    assert planes("ternary", 50) < 0.8 * planes("ternary", 0)
    assert planes("ternary", 50) < 0.9 * three_bits
    two_bits = float((W - rounded(W, "int2-g32")).square().sum())
    assert planes("binary", 50) < 0.95 * two_bits < planes("binary", 0)


@pytest.mark.parametrize("table", ["ternary", "binary"])
def test_scales_of_both_planes_are_those_of_least_squares_for_their_codes(table):
    """Scales are stored in bfloat16, and codes are the nearest for what is stored: that costs next to nothing."""
    fmt, residual = parse_format(f"{table}-g32"), Codes(format=f"{table}-g32", joint=50)
    first, tensors = residual.jointly(W, RTN().solve(W, None, fmt).quantized)
    second = residual.decode(tensors, K).view(W.shape)
    error, least = 0.0, 0.0
    for x, a, b in zip(*(t.double().view(-1, 32) for t in (W, first.decode(), second)), strict=True):
        error += float((x - a - b).square().sum())
        planes = torch.stack([a, b], 1)
        least += float((x - planes @ (torch.linalg.pinv(planes) @ x)).square().sum())
    assert error < 1.0005 * least


def test_it_is_read_back_as_it_is_spelled():
    for spelled in ("int4-g64", {"type": "lut", "table": [-1.0, 0.0, 1.0], "group": 32}):
        residual = Residual.of({"codes": {"format": spelled, "share": 0.1, "unit": 64}})
        assert Residual.of(residual.spelled()) == residual
    for wrong in ("int99", {"type": "int99"}, 4):
        with pytest.raises(Mistakes) as direct:
            parse_format(wrong)
        with pytest.raises(Mistakes) as inside:
            Residual.of({"codes": {"format": wrong}})
        expected = [(("codes", "format", *path), text) for path, text in direct.value.found]
        assert list(inside.value.found) == expected
