"""GPTQ against the paper's plain loop, and against rounding, on every format there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.formats._base import Format, Quantized
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram
from tests.reference.gptq import gptq, gptq_by_group

FORMATS = ["int2-g32", "int3-g64", "int4-g32", "int4-g64-asym", "int8-channel", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


def problem(n: int = 24, k: int = 64, tokens: int = 256, seed: int = 0) -> tuple[Tensor, InputStats]:
    """A small layer whose inputs are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k) * 0.5
    x = torch.randn(tokens, k, generator=generator) @ mix * torch.rand(k, generator=generator).mul(3).exp()
    stats = InputStats(k, frozenset({Gram, Channels}))
    stats.add(x)
    return torch.randn(n, k, generator=generator) * 0.05, stats


def loss(w: Tensor, q: Quantized, stats: InputStats) -> float:
    d = (w - q.decode()).double()
    return float(((d @ stats[Gram].matrix.double()) * d).sum())


def by_activation(stats: InputStats) -> list[int]:
    return stats[Gram].matrix.diagonal().argsort(descending=True, stable=True).tolist()  # type: ignore[no-any-return]


def not_as_in_the_plain_loop(w: Tensor, stats: InputStats, label: str, order: str) -> int:
    """Rows that have other codes than those of the reference."""
    fmt, columns = parse_format(label), by_activation(stats) if order == "activation" else list(range(w.shape[1]))
    q = GPTQ(fit="before", rounds=0, order=order, damp=0.01).solve(w, stats, fmt).quantized
    expected = gptq(w, stats[Gram].matrix, 0.01, columns, fmt, q.params)
    return int((q.codes != expected).any(dim=1).sum())


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("label", FORMATS)
def test_codes_equal_the_plain_loop(label: str, order: str) -> None:
    wrong = not_as_in_the_plain_loop(*problem(), label, order)
    assert wrong <= 1  # float32 against float64: a weight between two levels may tip over, and its row with it


@pytest.mark.parametrize("k", [129, 130, 131, 132])
def test_rows_may_have_any_number_of_columns(k: int) -> None:
    assert not_as_in_the_plain_loop(*problem(k=k), "int8-channel", "activation") <= 1


@pytest.mark.parametrize("label", ["int4-g32", "int3-g32-asym", "q4_1"])
def test_a_group_is_fitted_when_the_walk_reaches_it(label: str) -> None:
    w, stats = problem()
    fmt = parse_format(label)
    method = GPTQ(fit="walk", rounds=0, damp=0.01)
    q = method.solve(w, stats, fmt).quantized
    order, factor, _ = method._factor(stats, 32)
    weight = torch.empty(64)
    weight[order] = factor.diagonal().square().reciprocal()
    expected = gptq_by_group(w, stats[Gram].matrix, 0.01, order.tolist(), fmt.on_the_way(), weight)
    assert ((q.decode() - expected).abs() > 1e-4).float().mean() <= 0.02
    assert torch.allclose(q.decode().double().norm(), expected.norm(), rtol=2e-3)


def test_walk_order_takes_whole_groups_the_largest_first() -> None:
    _, stats = problem()
    order, *_ = GPTQ(fit="walk")._factor(stats, 32)
    groups = (order // 32).tolist()
    assert groups in ([0] * 32 + [1] * 32, [1] * 32 + [0] * 32)
    diagonal = stats[Gram].matrix.diagonal()[order]
    assert bool((diagonal[:31] >= diagonal[1:32]).all())
    assert diagonal[:32].sum() >= diagonal[32:].sum()


MARGIN_DB = {"int2-g32": 3.0, "int8-channel": 3.9}
"""How much lower the output error is than that of rounding with the same importance-weighted scales."""


@pytest.mark.parametrize("label", FORMATS)
def test_output_error_is_below_rounding(label: str) -> None:
    w, stats = problem(n=64, k=128, tokens=1024)
    fmt = parse_format(label)
    rounded = RTN(importance=True).solve(w, stats, fmt).quantized
    solved = GPTQ().solve(w, stats, fmt).quantized
    gain = 10 * torch.tensor(loss(w, rounded, stats) / loss(w, solved, stats)).log10()
    assert gain >= MARGIN_DB.get(label, 3.4)
    scaled = replace(solved, params={n: p * 1.01 if n in ("scale", "d") else p for n, p in solved.params.items()})
    assert loss(w, scaled, stats) > loss(w, solved, stats)


@pytest.mark.parametrize("label", ["int4-g32", "int3-g32-asym", "q4_1", "int4-channel"])
def test_every_round_lowers_the_objective(label: str) -> None:
    w, stats = problem(n=48, k=128, tokens=1024)
    fmt = parse_format(label)
    losses = [loss(w, GPTQ(rounds=r, damp=1e-4).solve(w, stats, fmt).quantized, stats) for r in (0, 1, 2, 3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize("label", ["int4-g32", "int3-g32-asym", "q4_1"])
def test_a_row_alone_is_solved_as_among_others(label: str) -> None:
    w, stats = problem()
    fmt, method = parse_format(label), GPTQ(rounds=2)
    alone, among = (method.solve(rows, stats, fmt).quantized.decode() for rows in (w[:1], w))
    torch.testing.assert_close(alone, among[:1])


def test_dead_channels_are_rounded_and_disturb_nothing() -> None:
    w, stats = problem()
    stats[Gram].matrix[5] = stats[Gram].matrix[:, 5] = 0
    stats[Gram].matrix[40] = stats[Gram].matrix[:, 40] = 0
    fmt = Int(bits=4, group=32)
    q = GPTQ().solve(w, stats, fmt).quantized
    assert bool(q.decode().isfinite().all())
    scale = fmt.affine(q.params)[0][:, 0].abs()
    inside = w[:, 5].abs() <= 7 * scale
    assert inside.float().mean() > 0.9
    assert bool(((w - q.decode())[:, 5].abs() <= 0.501 * scale)[inside].all())


def test_a_singular_gram_matrix_gets_damped() -> None:
    w, stats = problem(tokens=8)  # rank 8 of 64
    solution = GPTQ(damp=1e-2).solve(w, stats, Int(bits=4, group=32))
    assert loss(w, solution.quantized, stats) < loss(w, RTN().solve(w, stats, Int(bits=4, group=32)).quantized, stats)


def test_stronger_damping_and_fallback_are_reported() -> None:
    w, stats = problem()
    stats[Gram].matrix -= 0.05 * stats[Gram].matrix.diagonal().mean() * torch.eye(64)  # no longer positive semidefinite
    solution = GPTQ(damp=0.01).solve(w, stats, Int(bits=4, group=32))
    assert solution.fallback and solution.fallback.startswith("damping raised from 0.01 to")
    stats[Gram].matrix -= 1e3 * stats[Gram].matrix.diagonal().mean() * torch.eye(64)
    stats.cache.clear()
    solution = GPTQ(damp=0.01).solve(w, stats, Int(bits=4, group=32))
    assert solution.fallback and solution.fallback.startswith("rounded to nearest: the Gram matrix")
    expected = RTN().solve(w, stats, Int(bits=4, group=32)).quantized
    assert torch.equal(solution.quantized.codes, expected.codes)


def test_layers_that_read_the_same_input_share_one_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    import qtool.methods.gptq as module

    w, stats = problem()
    calls = []
    real = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *args: calls.append(1) or real(*args))
    for _ in range(3):
        GPTQ().solve(w, stats, Int(bits=4, group=32))
    assert len(calls) == 1


@pytest.mark.parametrize("label", ["int4-g32", "q4_1"])
def test_same_bytes_for_any_number_of_threads(label: str, use_threads: Callable[[int], None]) -> None:
    w, stats = problem(n=50)
    fmt: Format = parse_format(label)
    results = []
    for count in (1, 2, 3):
        use_threads(count)
        results.append(GPTQ().solve(w, stats, fmt).quantized)
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes)
        assert all(torch.equal(p, other.params[name]) for name, p in results[0].params.items())


def test_drift_is_made_up_for_in_what_is_approximated() -> None:
    """With A the plain regression of X_0 - X on X, the codes are those of W (I + A / 2) without drift."""
    w, _ = problem()
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(512, 64, generator=generator)
    x_0 = x + 0.3 * x @ torch.randn(64, 64, generator=generator) / 8 + 0.01 * torch.randn(512, 64, generator=generator)
    drifted = InputStats(64, frozenset({Gram, Drift}))
    drifted.add(x, x_0)
    h = x.double().T @ x.double()
    damped = h + 0.3 * h.diagonal().mean() * torch.eye(64)
    back = ((x_0 - x).double().T @ x.double()) @ torch.linalg.inv(damped)
    target = (w.double() + 0.5 * w.double() @ back).float()
    fmt = parse_format("int4-g32")
    found = GPTQ(drift=0.5).solve(w, drifted, fmt)
    plain = InputStats(64, frozenset({Gram}))
    plain.add(x)
    want = GPTQ(drift=0).solve(target, plain, fmt)
    others = (found.quantized.codes != want.quantized.codes).any(1)
    assert others.sum() <= 1  # of 24 rows: behind a scale that the last bit of a sum decides, codes are others
    assert found.target is not None
    torch.testing.assert_close(found.target, target, rtol=1e-4, atol=1e-5)
    assert float((target - w).std()) > 0.05 * float(w.std())
    assert torch.equal(
        GPTQ(drift=0.5).solve(w, plain, fmt).quantized.codes, GPTQ(drift=0).solve(w, plain, fmt).quantized.codes
    )


def test_all_of_the_drift_without_a_ridge_is_the_asymmetric_objective() -> None:
    """Two matrices differ in |W X_0 - W_hat X|^2 (GPTAQ, Qronos) by as much as in what the walk minimizes."""
    x, w, noise, *steps = (
        torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).double() for n in (200, 3, 201, 4, 5)
    )
    x_0 = x + 0.3 * noise[:200] + 0.2 * x.roll(1, 1)
    stats = InputStats(16, frozenset({Gram, Drift}))
    stats.add(x.float(), x_0.float())
    target = GPTQ(drift=1, drift_damp=1e-6)._target(w.float(), stats).double()
    first, second = (w + 0.1 * step[:3] for step in steps)

    def asymmetric(w_hat: torch.Tensor) -> float:
        return float((x_0 @ w.T - x @ w_hat.T).square().sum())

    def walked(w_hat: torch.Tensor) -> float:
        return float((x @ (target - w_hat).T).square().sum())

    assert asymmetric(first) - asymmetric(second) == pytest.approx(walked(first) - walked(second), rel=1e-3)
    assert asymmetric(target) < 0.9 * asymmetric(w)
