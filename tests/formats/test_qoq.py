"""Integers in integers: no overflow whatever the code, the paper's rule, the search against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._spelling import parse_format
from qtool.formats.qoq import QoQ
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.numerics.grids.progressive import largest_step
from tests.methods.test_gptq import loss, problem


def weights(n: int = 64, k: int = 256, seed: int = 0) -> Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[3] = w[3].sign() * 0.1
    w[4, ::2] *= 20
    w[5] = 0
    return w


def inner(params: dict[str, Tensor], q: int) -> Tensor:
    """w8 that a code stands for, int32 [N, G]."""
    return params["step"].int() * (q - params["zero"].int())


def error(fmt: QoQ, w: Tensor, importance: Tensor | None = None) -> float:
    params = fmt.fit(w, importance)
    squares = (w - fmt.decode(fmt.snap(w, params), params)).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("scales", ["minmax", "search"])
def test_eight_bits_never_overflow(scales: str) -> None:
    params = QoQ(group=32, scales=scales).fit(weights())
    for q in range(16):
        w8 = inner(params, q)
        assert int(w8.min()) >= -128 and int(w8.max()) <= 127
    assert int(params["step"].max()) * 15 <= 255
    assert int(params["zero"].max()) <= 15


def test_decoding_is_integer_arithmetic_and_one_product() -> None:
    fmt, w = QoQ(group=64), weights()
    params = fmt.fit(w)
    codes = fmt.snap(w, params)
    step, zero = (params[name].int().repeat_interleave(64, 1) for name in ("step", "zero"))
    expected = (step * (codes.int() - zero)).double() * params["row"].double()
    assert torch.equal(fmt.decode(codes, params).double(), expected)
    row, (amax, _) = params["row"].float(), w.abs().max(1, keepdim=True)
    assert torch.equal(row[6:], (amax / 119).half().float()[6:])
    nearest = ((w / row / step).round() + zero).clamp(0, 15)
    assert (codes != nearest).float().mean() < 1e-3


def test_minmax_is_the_papers() -> None:
    w = torch.zeros(1, 32)
    w[0, :2] = torch.tensor([119.0, -61.0])
    w[0, 16:] = torch.linspace(-30, 30, 16)
    params = QoQ(group=16, scales="minmax").fit(w)
    assert params["row"].tolist() == [[1.0]]
    assert params["step"].tolist() == [[12, 4]]  # 180 / 15, 60 / 15
    assert params["zero"].tolist() == [[5, 8]]  # 61 / 12, 30 / 4


def test_largest_step_by_trying_all() -> None:
    zeros = torch.arange(16, dtype=torch.uint8)
    for z, found in zip(range(16), largest_step(zeros).tolist(), strict=True):
        allowed = [s for s in range(1, 256) if s * 15 <= 255 and s * (15 - z) <= 127 and s * z <= 128]
        assert found == max(allowed)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_finds_the_best_pair(weighted: bool) -> None:
    w = weights(16, 64)
    importance = torch.randn(64, generator=torch.Generator().manual_seed(1)).exp() if weighted else None
    fmt = QoQ(group=32)
    params = fmt.fit(w, importance)
    weight = torch.ones(64) if importance is None else importance
    w8 = (w / params["row"].float()).view(16, 2, 32)
    best = torch.full((16, 2), torch.inf)
    for z in range(16):
        for s in range(1, int(largest_step(torch.tensor([z], dtype=torch.uint8))) + 1):
            q = ((w8 / s).round() + z).clamp(0, 15)
            best = torch.minimum(best, ((s * (q - z) - w8).square() * weight.view(2, 32)).sum(-1))
    found = (fmt.decode(fmt.snap(w, params), params) / params["row"].float()).view(16, 2, 32)
    errors = ((found - w8).square() * weight.view(2, 32)).sum(-1)
    assert float((errors / best.clamp_min(1e-9)).median()) <= 1.0 + 1e-4
    assert float(errors.sum() / best.sum()) <= 1.01
    assert error(fmt, w, importance) < 0.96 * error(QoQ(group=32, scales="minmax"), w, importance)


def test_error_lies_a_little_above_that_of_one_level() -> None:
    w = torch.randn(128, 1024, generator=torch.Generator().manual_seed(2))
    ratio = error(QoQ(group=128), w) / sum(
        float((w - f.decode(f.snap(w, p), p)).double().square().sum())
        for f in [parse_format("int4-g128-asym")]
        for p in [f.fit(w)]
    )
    assert 1.0 < ratio < 1.12


def test_gptq_keeps_within_eight_bits_and_wins() -> None:
    w, stats = problem(n=64, k=128, tokens=1024)
    fmt = QoQ(group=32)
    solved = GPTQ(rounds=2).solve(w, stats, fmt).quantized
    assert all(int(inner(solved.params, q).abs().max()) <= 128 - (q > 7) for q in range(16))
    rounded = RTN(importance=True).solve(w, stats, fmt).quantized
    assert 10 * torch.tensor(loss(w, rounded, stats) / loss(w, solved, stats)).log10() >= 3.3


def test_refit_keeps_the_protective_range() -> None:
    fmt = QoQ(group=16)
    params = {
        "row": torch.tensor([[0.5]]).half(),
        "step": torch.tensor([[3, 3, 3]], dtype=torch.uint8),
        "zero": torch.tensor([[0, 8, 15]], dtype=torch.uint8),
    }
    new = fmt.refit(params, torch.tensor([[2.2, 100.0, -4.0]]), torch.zeros(1, 3))
    assert new["step"].tolist() == [[4, 16, 1]]


@pytest.mark.parametrize("scales", ["minmax", "search"])
def test_rows_too_small_for_fp16_take_its_smallest_number(scales: str) -> None:
    fmt, w = QoQ(group=32, scales=scales), weights(16) * 1e-6
    assert float(w.abs().max()) / 119 < 2.0**-25
    assert fmt.fit(w)["row"].unique().tolist() == [2.0**-24, 1.0]  # one row is zeros
    assert error(fmt, w) < 0.02 * float(w.double().square().sum())


def test_zeros_sizes_names_and_what_is_too_large() -> None:
    fmt = QoQ()
    params = fmt.fit(torch.zeros(2, 256))
    assert bool((fmt.decode(fmt.snap(torch.zeros(2, 256), params), params) == 0).all())
    assert fmt.storage_bits(10, 256) == 10 * 256 * 4 + 20 * 12 + 160
    assert parse_format("qoq-g64") == QoQ(group=64) and parse_format("qoq") == fmt and fmt.label == "qoq-g128"
    assert fmt.block_columns is None and fmt.misfit(192) is not None
    for bad in (1e9, torch.nan, torch.inf):
        with pytest.raises(NumericsError, match="qoq-g128 stores the scales of rows in fp16"):
            fmt.fit(torch.full((1, 128), bad))
