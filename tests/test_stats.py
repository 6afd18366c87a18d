"""Statistics of inputs against plain sums, and what holds for each: parts merge to the whole, states load."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from qtool import registry
from qtool.numerics.threads.ranks import Ranks
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram

NEEDS = frozenset({Gram, Channels, Drift})
GENERATOR = torch.Generator().manual_seed(0)
X, X_0 = torch.randn(2, 90, 200, generator=GENERATOR) + 0.5


def assert_equal(stats: InputStats, compared: int) -> None:
    """All tokens are counted, the first ones compared."""
    x, x_0 = X.double(), X_0.double()
    assert stats.tokens == len(X)
    assert_close(stats[Gram].matrix.double(), x.T @ x, rtol=1e-5, atol=1e-3)
    assert_close(stats[Drift].pair[0].double(), (x_0 - x)[:compared].T @ x[:compared], rtol=1e-4, atol=1e-3)
    assert_close(stats[Drift].pair[1].double(), x[:compared].T @ x[:compared], rtol=1e-5, atol=1e-3)
    assert_close(stats[Channels].importance.double(), x.square().mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats[Channels].absmax, X.abs().amax(0))


@pytest.mark.parametrize("compared", [30, 60, 90])
def test_batches_are_compared_and_then_counted(compared: int) -> None:
    stats = InputStats(200, NEEDS)
    for start in range(0, 90, 30):
        part = slice(start, start + 30)
        stats.add(X[part], X_0[part] if start < compared else None)
    assert_equal(stats, compared)


@pytest.mark.parametrize("order", ["cnc", "ncc", "ccn", "ncn"])
def test_tokens_that_are_compared_may_come_late(order: str) -> None:  # where experts let some batches overtake others
    stats, seen = InputStats(200, NEEDS), []
    for number, kind in enumerate(order):
        part = slice(30 * number, 30 * number + 30)
        stats.add(X[part], X_0[part] if kind == "c" else None)
        seen += [part] if kind == "c" else []
    x, x_0 = (torch.cat([every[part] for part in seen]).double() for every in (X, X_0))
    assert_close(stats[Gram].matrix.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-3)
    assert_close(stats[Drift].pair[0].double(), (x_0 - x).T @ x, rtol=1e-4, atol=1e-3)
    assert_close(stats[Drift].pair[1].double(), x.T @ x, rtol=1e-5, atol=1e-3)


def test_parts_are_merged() -> None:
    parts = []
    for begin, compared, end in ((0, 40, 50), (50, 60, 90)):
        stats = InputStats(200, NEEDS)
        stats.add(X[begin:end], X_0[begin:compared])  # compared as far as there is something to compare with
        parts.append(stats)
    parts[0].merge(parts[1])
    gram, drift = parts[0][Gram].matrix, parts[0][Drift].pair
    seen = torch.cat([torch.arange(40), torch.arange(50, 60)])
    x, x_0 = X[seen].double(), X_0[seen].double()
    assert_close(gram.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-3)
    assert_close(drift[0].double(), (x_0 - x).T @ x, rtol=1e-4, atol=1e-3)
    assert_close(drift[1].double(), x.T @ x, rtol=1e-5, atol=1e-3)


def test_parts_are_merged_channel_by_channel() -> None:
    parts = []
    for rows in (X[:40], X[40:]):
        parts.append(InputStats(200, frozenset({Channels})))
        parts[-1].add(rows)
    parts[0].merge(parts[1])
    assert parts[0].tokens == 90
    assert_close(parts[0][Channels].importance.double(), X.double().square().mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(parts[0][Channels].low, X.amin(0)) and torch.equal(parts[0][Channels].high, X.amax(0))


def test_without_comparison_there_is_no_drift() -> None:
    stats = InputStats(200, NEEDS)
    stats.add(X)
    assert stats[Drift].pair is None


KINDS = [registry.load("stats", name) for name in registry.names("stats")]


def measured(kind: type, x: torch.Tensor, x_0: torch.Tensor | None = None) -> InputStats:
    stats = InputStats(x.shape[1], frozenset({kind}))
    for part in range(0, len(x), 20):
        stats.add(x[part : part + 20], None if x_0 is None else x_0[part : part + 20] if part < len(x_0) else None)
    return stats


def assert_same(found: InputStats, want: InputStats) -> None:
    assert found.tokens == want.tokens
    for a, b in zip(found, want, strict=True):
        assert type(a) is type(b)
        assert a.state().keys() == b.state().keys()
        for name, tensor in b.state().items():
            assert_close(
                a.state()[name], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()), msg=f"{a.name()} {name}"
            )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name())
@pytest.mark.parametrize("cuts", [(40,), (20, 60), (0, 90)], ids=str)
def test_parts_merge_to_what_one_pass_measures(kind: type, cuts: tuple[int, ...]) -> None:
    x = X.clone()
    x[60:] *= 5  # so that parts have other ranges
    compared = X_0[:40]
    merged = InputStats(200, frozenset({kind}))
    for a, b in zip((0, *cuts), (*cuts, 90), strict=True):
        merged.merge(measured(kind, x[a:b], compared[a:b] if a < 40 else None))
    assert_same(merged, measured(kind, x, compared))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name())
def test_a_state_is_loaded_and_merged_further(kind: type) -> None:
    first, rest = measured(kind, X[:40], X_0[:40]), measured(kind, X[40:])
    loaded = InputStats(200, first.needs)
    for statistic in first:
        loaded[type(statistic)].load({name: tensor.clone() for name, tensor in statistic.state().items()})
    loaded.tokens = first.tokens
    assert_same(loaded, first)
    loaded.merge(rest)
    assert_same(loaded, measured(kind, X, X_0[:40]))


def combined(ranks: Ranks, kind: type, cut: int) -> tuple[int, dict[str, dict[str, torch.Tensor]]]:
    """Tokens up to a cut in one process, the others in the other."""
    x, x_0 = (X[:cut], X_0[: min(cut, 40)]) if ranks.first else (X[cut:], X_0[cut:40])
    stats = measured(kind, x, x_0)
    stats.combine(ranks)
    return stats.tokens, {s.name(): s.state() for s in stats}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name())
@pytest.mark.parametrize("cut", [20, 60, 0])
def test_processes_combine_what_they_measured(kind: type, cut: int, together) -> None:
    (tokens, first), (others, second) = together(combined, kind, cut)
    want = measured(kind, X, X_0[:40])
    assert tokens == others == want.tokens
    assert first.keys() == second.keys() == {s.name() for s in want}
    for statistic in want:
        state = statistic.state()
        assert first[statistic.name()].keys() == state.keys()
        for name, tensor in state.items():
            found = first[statistic.name()][name]
            assert torch.equal(found, second[statistic.name()][name])
            assert_close(found, tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()))


WRONG = {
    "means": {"sums": torch.zeros(200)},
    "gram": {"matrix": torch.eye(200).tril() + torch.tril(torch.ones(200, 200), -1)},
    "drift": {"cross": torch.zeros(200, 200)},
    "channels": {"sum_squares": -torch.ones(200), "low": torch.zeros(200), "high": torch.ones(200)},
    "values": {
        "counts": torch.ones(1, 8192).double(),
        "reach": torch.ones(1),
        "low": -torch.ones(1),
        "high": torch.ones(1) * 3,
    },
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name())
def test_what_cannot_have_been_measured_is_not_loaded(kind: type) -> None:
    stats = measured(kind, X, X_0)
    state = stats[kind].state()
    changed = [{name: tensor[..., :-1] for name, tensor in state.items()}, state | {"more": torch.zeros(1)}]
    infinite = {name: tensor.clone() for name, tensor in state.items()}
    next(iter(infinite.values())).flatten()[3] = torch.inf
    for each in (*changed, infinite, WRONG[kind.name()]):
        with pytest.raises(ValueError, match=r"^wanted .*, found "):
            InputStats(200, frozenset({kind}))[kind].load(each)


def test_what_a_statistic_uses_is_measured_and_told_later() -> None:
    assert [type(s) for s in InputStats(8, frozenset({Drift, Channels}))] == [Channels, Drift, Gram]
    assert [type(s) for s in InputStats(8, NEEDS)] == [Channels, Drift, Gram]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_tokens_count_by_their_weights(dtype: torch.dtype, close: float) -> None:
    """Two groups of outputs of one module, one of another; the first 30 of 90 tokens are compared; two parts."""
    weights = {"q": torch.rand(90, 2, generator=GENERATOR) ** 4 * 50, "k": torch.rand(90, 1, generator=GENERATOR)}
    x, x_0 = X.to(dtype), X_0.to(dtype)
    parts = [InputStats(200, NEEDS, groups={"q": 2, "k": 1}) for _ in range(2)]
    for stats, compared, part in zip(parts, (x_0[:30], None), (slice(0, 50), slice(50, 90)), strict=True):
        stats.add(x[part], compared, {name: w[part] for name, w in weights.items()})
    parts[0].merge(parts[1])
    found = parts[0]
    assert (found.get(Gram), found.get(Drift), found.tokens, found.of("v")) == (None, None, 90, (found,))
    assert_close(found[Channels].importance, x.float().square().mean(0))
    assert torch.equal(found[Channels].high, x.amax(0).float())
    for name, columns in weights.items():
        for stats, w in zip(found.of(name), columns.unbind(1), strict=True):
            gram, compared, cross = (torch.zeros(200, 200, dtype=torch.float64) for _ in range(3))
            for t in range(90):
                outer = float(w[t]) * torch.outer(x[t].double(), x[t].double())
                gram += outer
                if t < 30:
                    compared += outer
                    cross += float(w[t]) * torch.outer((x_0[t] - x[t]).double(), x[t].double())
            size = close * float(gram.diagonal().mean())
            assert_close(stats[Gram].matrix.double(), gram, rtol=close / 4, atol=size)
            assert_close(stats[Channels].sum_squares.double(), gram.diagonal(), rtol=close, atol=0)
            assert_close(stats[Drift].pair[0].double(), cross, rtol=close / 4, atol=size)
            assert_close(stats[Drift].pair[1].double(), compared, rtol=close / 4, atol=size)
            assert stats.tokens == 90
    alone = InputStats(200, frozenset({Channels}), groups={"q": 1})
    alone.add(X, None, {"q": weights["k"]})
    assert_close(alone.of("q")[0][Channels].sum_squares, (weights["k"] * X.square()).sum(0))


def test_a_gram_matrix_goes_with_its_statistics_and_waits_for_no_collector() -> None:
    gc.disable()
    try:
        stats = measured(Gram, X, X_0)
        gone = weakref.ref(stats[Gram])
        del stats
        assert gone() is None
    finally:
        gc.enable()
