"""What each transform chooses, against the formulas of papers as plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qtool import registry
from qtool.formats.int import Int
from qtool.ops import hadamard as hadamard_op
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.permutation import Permutation
from qtool.ops.reassembly import Reassembly
from qtool.ops.scale import Scale
from qtool.stats._base import InputStats
from qtool.transforms import awq
from qtool.transforms._base import Kind, Reader, Site, Transform
from qtool.transforms._keys import energies
from qtool.transforms._trained import TrainedTransform
from qtool.transforms.awq import AWQ
from qtool.transforms.equalize import Equalize
from qtool.transforms.exponents import Exponents
from qtool.transforms.hadamard import Hadamard
from qtool.transforms.keys import Keys
from qtool.transforms.ksort import KSort
from qtool.transforms.permute import Permute
from qtool.transforms.reassemble import Reassemble, distances, whole
from qtool.transforms.rotate import Rotate
from qtool.transforms.shift import Shift
from qtool.transforms.smooth import Smooth

FORMAT = Int(bits=4, group=8, scales="minmax")
HEADS, DIM, REPEAT = 2, 8, 2
WIDE = HEADS * REPEAT * DIM


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(k: int) -> Tensor:
    """[T, K] with channels of very different size."""
    return randn(50, k) * torch.exp(1.5 * randn(k))


def rounded(w: Tensor, importance: Tensor | None) -> Tensor:
    params = FORMAT.fit(w)
    return FORMAT.decode(FORMAT.snap(w, params), params)


def site(kind: Kind, transform: Transform, *weights: Tensor, source: Tensor | None = None) -> tuple[Site, Tensor]:
    """A site whose readers have these weights, and the inputs that were measured there."""
    k = weights[0].shape[1]
    repeat, dim = (REPEAT, DIM) if kind == "heads" else (1, k if kind == "stream" else 1)
    x, stats = inputs(k), None
    if transform.needs:
        stats = InputStats(k, transform.needs)
        stats.add(x)
    readers = tuple(Reader(lambda w=w: w, rounded, False) for w in weights)
    return Site(kind, k // repeat, dim, repeat, readers, None if source is None else lambda: source, stats, 3), x


def columns(channel: int) -> list[int]:
    """The columns of o that read a channel of v."""
    head, place = divmod(channel, DIM)
    return [(head * REPEAT + copy) * DIM + place for copy in range(REPEAT)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_smooth(alpha: float) -> None:
    transform = Smooth(alpha=alpha)
    w, v = randn(6, 32), randn(5, 32)
    place, x = site("norm", transform, w, v)
    found = transform.op(place)
    assert isinstance(found, Scale)
    expected = []
    for j in range(32):
        largest = max(float(w[:, j].abs().max()), float(v[:, j].abs().max()))
        expected.append(float(x[:, j].abs().max()) ** alpha / largest ** (1 - alpha))
    ratio = found.factors.double() / torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ratio, ratio[:1].expand(32), rtol=1e-5, atol=0)
    assert float(found.factors.log().mean()) == pytest.approx(0, abs=1e-5)


def test_smooth_takes_the_largest_of_the_heads_that_share_a_value() -> None:
    transform, w = Smooth(alpha=0.5), randn(6, WIDE)
    place, x = site("heads", transform, w)
    found = transform.op(place)
    assert found is not None
    expected = []
    for c in range(HEADS * DIM):
        largest = max(float(w[:, j].abs().max()) for j in columns(c))
        expected.append((max(float(x[:, j].abs().max()) for j in columns(c)) / largest) ** 0.5)
    ratio = found.factors / torch.tensor(expected)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_silent_channels_get_no_wild_factors() -> None:
    transform, w = Smooth(), randn(6, 32)
    w[:, 3] = 0
    place, _ = site("norm", transform, w)
    stats = InputStats(32, transform.needs)
    stats.add(randn(9, 32) * (torch.arange(32) != 4))
    found = transform.op(replace(place, stats=stats))
    assert found is not None
    assert found.factors.isfinite().all()
    assert found.factors.max() / found.factors.min() < 2e3


def test_smooth_of_experts_takes_the_largest_factors_of_what_comes_to_each() -> None:
    transform = Smooth(alpha=0.6, experts="largest")
    w, v = randn(6, 32), randn(5, 32)
    place, _ = site("norm", transform, w, v)
    seen = [inputs(32), inputs(32) * torch.exp(randn(32))]
    stats = [InputStats(32, transform.needs) for _ in range(3)]
    for x, own in zip(seen, stats, strict=False):
        own.add(x)
    readers = [replace(r, stats=own) for r, own in zip((*place.readers, place.readers[0]), stats, strict=True)]
    found = transform.op(replace(place, readers=tuple(readers)))  # the third got no token
    assert found is not None
    expected = []
    for j in range(32):
        each = [
            float(x[:, j].abs().max()) ** 0.6 / float(m[:, j].abs().max()) ** 0.4
            for x, m in zip(seen, (w, v), strict=True)
        ]
        expected.append(max(each))
    ratio = found.factors.double() / torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ratio, ratio[:1].expand(32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("octaves", [1, 3, 7])
def test_exponents_are_powers_of_two_that_bring_channels_together(octaves: int) -> None:
    transform = Exponents(octaves=octaves)
    place, x = site("norm", transform, randn(6, 32))
    found = transform.op(place)
    assert found is not None
    largest = [float(x[:, j].abs().max()) for j in range(32)]
    for j in range(32):
        power = round(math.log2(largest[j] / max(largest)))
        assert float(found.factors[j]) == 2.0 ** max(-octaves, power)
    w = randn(6, 32).bfloat16()
    assert torch.equal(found.fold(w.float()).bfloat16().float(), found.fold(w.float()))  # nothing is rounded


@pytest.mark.parametrize("rotary", [8, 4])
def test_keys_are_evened_out_in_the_pairs_that_are_rotated(rotary: int) -> None:
    transform = Keys(alpha=0.5)
    w = randn(HEADS * DIM, 32) * torch.exp(2 * randn(HEADS * DIM + 1)[1:, None])
    place, x = site("norm", transform, randn(3, 32), source=w)
    found = transform.op(replace(place, kind="scores", width=HEADS * DIM, dim=DIM, readers=(), rotary=rotary))
    assert found is not None
    keys = x @ w.T
    expected = torch.empty(HEADS * DIM, dtype=torch.float64)
    for head in range(HEADS):
        for i in range(DIM):
            mates = [i, (i + rotary // 2) % rotary] if i < rotary else [i]
            squares = [float(keys[:, head * DIM + m].double().square().mean()) for m in mates]
            expected[head * DIM + i] = (sum(squares) / len(squares)) ** 0.25
    for head in range(HEADS):
        part = slice(head * DIM, (head + 1) * DIM)
        ratio = found.factors[part].double() / expected[part]
        torch.testing.assert_close(ratio, ratio[:1].expand(DIM), rtol=1e-4, atol=0)
        assert float(found.factors[part].log().mean()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rotary", [8, 4, 0])
def test_the_larger_channel_of_a_pair_comes_first_and_free_ones_are_sorted(rotary: int) -> None:
    transform = KSort()
    w, bias = randn(HEADS * DIM, 32) * 0.1, randn(HEADS * DIM)
    place, x = site("norm", transform, randn(3, 32), source=w)
    place = replace(place, kind="scores", width=HEADS * DIM, dim=DIM, readers=(), rotary=rotary, bias=lambda: bias)
    found = transform.op(place)
    keys = x @ w.T + bias
    sizes = keys.double().square().mean(0)
    expected = keys.clone()
    for start in range(0, HEADS * DIM, DIM):
        for i in range(rotary // 2):
            a, b = start + i, start + i + rotary // 2
            if sizes[b] > sizes[a]:
                expected[:, a], expected[:, b] = keys[:, b], -keys[:, a]
        free = sorted(range(start + rotary, start + DIM), key=lambda j: -float(sizes[j]))
        expected[:, start + rotary : start + DIM] = keys[:, free]
    torch.testing.assert_close(found.apply(keys), expected, rtol=0, atol=0)
    assert not torch.equal(expected, keys)
    assert KSort().op(replace(place, stats=InputStats(32, transform.needs))) is None


def test_sizes_of_keys_are_those_that_are_measured() -> None:
    w, bias = randn(HEADS * DIM, 32), 3 * randn(HEADS * DIM)
    place, x = site("norm", KSort(), randn(3, 32), source=w)
    for added in (None, bias):
        found = energies(replace(place, kind="scores", bias=None if added is None else lambda: bias))
        keys = x.double() @ w.double().T + (0 if added is None else added.double())
        torch.testing.assert_close(found, keys.square().mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("kind", ["norm", "heads"])
def test_awq_takes_the_factors_that_leave_least_error(kind: Kind, uneven: bool) -> None:
    transform = AWQ(steps=10)
    spread = torch.exp(2 * randn(WIDE + 1)[1:]) if uneven else torch.ones(WIDE)
    w, v = randn(6, WIDE) * spread, randn(5, WIDE) * spread
    place, x = site(kind, transform, w, v)
    found = transform.op(place)
    assert found is not None
    reading = [columns(c) for c in range(HEADS * DIM)] if kind == "heads" else [[j] for j in range(WIDE)]
    size = torch.stack([x[:, group].square().mean().sqrt() for group in reading])
    column = torch.stack([torch.cat([w, v])[:, group].square().mean().sqrt() for group in reading])
    tried = [size ** (a / 10) for a in range(10)] + [size ** (a / 10) / column ** (1 - a / 10) for a in range(10)]
    errors = []
    for s in tried:
        s = s / (s.max() * s.min()).sqrt()
        wide = torch.empty(WIDE)
        for channel, group in enumerate(reading):
            wide[group] = s[channel]
        errors.append(sum(float((x @ (rounded(m * wide, None) / wide - m).T).square().sum()) for m in (w, v)))
    best = min(range(20), key=errors.__getitem__)
    assert best % 10 not in (0, 9)  # or the search would prove nothing
    assert best > 10 or not uneven
    expected = tried[best]
    torch.testing.assert_close(found.factors, expected / (expected.max() * expected.min()).sqrt(), rtol=1e-4, atol=0)


def test_awq_hands_importance_on() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(w: Tensor, importance: Tensor | None) -> Tensor:
        assert importance is not None
        seen.append((w, importance))
        return rounded(w, None)

    transform, w = AWQ(steps=2), randn(6, 32)
    place, x = site("norm", transform, w)
    transform.op(replace(place, readers=(Reader(lambda: w, look, False),)))
    scaled, importance = seen[1]
    factors = scaled[0] / w[0]
    torch.testing.assert_close(importance, x.square().sum(0) / factors.square(), rtol=1e-4, atol=0)
    assert not torch.allclose(factors, factors[:1])


def test_awq_looks_at_rows_all_over_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "ROWS", 4)
    assert awq.some_rows(torch.arange(10.0)[:, None]).flatten().tolist() == [0, 3, 6, 9]
    assert awq.some_rows(torch.arange(3.0)[:, None]).flatten().tolist() == [0, 1, 2]


def test_equalize_leaves_equal_ranges() -> None:
    w, rows = randn(6, WIDE), randn(HEADS * DIM, 7)
    place, _ = site("heads", Equalize(), w, source=rows)
    found = Equalize().op(place)
    assert found is not None
    writes = (rows / found.factors[:, None]).abs().amax(1)
    for channel in range(HEADS * DIM):
        reads = max(float((w[:, j] * found.factors[channel]).abs().max()) for j in columns(channel))
        assert reads == pytest.approx(float(writes[channel]), rel=1e-5)


@pytest.mark.parametrize("by", ["weights", "inputs"])
def test_permute_sorts_each_head(by: str) -> None:
    transform = Permute.model_validate({"by": by})
    w = randn(6, WIDE) * torch.exp(randn(WIDE))
    place, x = site("heads", transform, w)
    found = transform.op(place)
    assert isinstance(found, Permutation)
    if by == "weights":
        size = [float(sum(w[:, j].square().sum() for j in columns(c))) for c in range(HEADS * DIM)]
    else:
        size = [max(float(x[:, j].abs().max()) for j in columns(c)) for c in range(HEADS * DIM)]
    for head in range(HEADS):
        mine = found.order[head * DIM : (head + 1) * DIM].tolist()
        assert mine == sorted(range(head * DIM, (head + 1) * DIM), key=lambda c: -size[c])


def test_permute_sorts_all_channels_of_a_product() -> None:
    w = randn(6, 32)
    place, _ = site("product", Permute(), w)
    found = Permute().op(place)
    assert found is not None
    assert found.order.tolist() == sorted(range(32), key=lambda c: -float(w[:, c].square().sum()))


def test_permute_sorts_inputs_in_front_of_layers() -> None:
    transform, w = Permute(by="inputs", edges=("input",)), randn(6, 32)
    place, x = site("input", transform, w)
    found = transform.op(place)
    assert found is not None
    sizes = [float(x[:, j].abs().max()) for j in range(32)]
    assert found.order.tolist() == sorted(range(32), key=lambda j: -sizes[j])
    stays = transform.stays(32)
    assert stays is not None
    assert (stays.label, stays.width) == (found.label, 32)
    assert Permute().stays(32) is None


def test_reassemble_splits_outliers_and_merges_what_costs_least() -> None:
    transform, w = Reassemble(most=0.25, bits=4), randn(6, 32)
    w[:, 7] = w[:, 12]  # merging these loses nothing
    place, x = site("input", transform, w)
    x = randn(50, 32)
    x[:, 5] *= 40
    stats = InputStats(32, transform.needs)
    stats.add(x)
    found = transform.op(replace(place, stats=stats))
    assert found is not None
    parts = [int((found.first == j).sum()) for j in range(32)]
    assert parts[5] > 4
    merged = [(int(a), int(b)) for a, b in zip(found.first, found.second, strict=True) if a != b]
    assert len(merged) == parts[5] - 1 <= 8
    assert (12, 7) in merged
    assert {a % 2 for a, _ in merged} == {0}
    assert len({j for pair in merged for j in pair}) == 2 * len(merged)
    between = x @ w.T - found.apply(x) @ found.fold(w).T
    alone = sum(float((x[:, a] - x[:, b]).square().sum() * (w[:, a] - w[:, b]).square().sum()) / 4 for a, b in merged)
    assert float(between.square().sum()) == pytest.approx(alone, rel=0.6)  # errors of pairs hardly correlate

    def through(op: Reassembly) -> float:
        y = op.apply(x)
        step = y.abs().amax(1, keepdim=True) / 7
        return float(((y / step).round() * step @ op.fold(w).T - x @ w.T).square().sum())

    assert through(found) < 0.5 * through(whole(32))
    costs = distances(x.double().T @ x.double()) * distances(w.double().T @ w.double()) / 4
    largest, squares, lost = x.abs().amax(0).double(), w.double().square().sum(0), []
    for theta in (float(largest.max()) * torch.logspace(0, -5, 100, 2.0, dtype=torch.float64)).tolist():
        split = [max(1, math.ceil(float(top) / theta)) for top in largest]
        free = [
            (float(costs[a, b]), a, b) for a in range(0, 32, 2) for b in range(1, 32, 2) if split[a] == split[b] == 1
        ]
        pairs = list[tuple[float, int, int]]()
        for one in sorted(free):
            if len(pairs) < sum(split) - 32 and not {one[1], one[2]} & {j for pair in pairs for j in pair[1:]}:
                pairs.append(one)
        if sum(split) - 32 > 8 or len(pairs) < sum(split) - 32:
            break
        read = sum(float(squares[j]) * split[j] for j in range(32))
        read += sum(2 * float(w[:, a].double() @ w[:, b].double()) for _, a, b in pairs)
        rounding = (2 * theta / 2**4) ** 2 / 12 * 50 * read
        lost.append((sum(cost for cost, *_ in pairs) + rounding, split[5]))
    assert parts[5] == min(lost)[1]
    assert transform.stays(32) == whole(32)
    assert Reassemble(most=0).op(replace(place, stats=stats)) == whole(32)


def test_rotate() -> None:
    place = Site("stream", 576, 576, 1, (), None, None, 5)
    found = Rotate().op(place)
    assert isinstance(found, hadamard_op.Hadamard)
    assert found.block == 576
    assert 200 < int((found.signs == 1).sum()) < 376
    assert found == Rotate().op(place)
    assert found != Rotate().op(replace(place, seed=6))
    random = Rotate(matrix="random").op(Site("heads", 32, 8, 2, (), None, None, 5))
    assert isinstance(random, Orthogonal)
    assert (random.width, random.run) == (32, 8)
    assert Rotate().misfit("stream", 92, 92) == "no Hadamard matrix of order 92 is known here; use matrix: random"
    assert Rotate(matrix="random").misfit("stream", 92, 92) is None
    mixed = Rotate(matrix="permutation").op(Site("heads", 32, 8, 2, (), None, None, 5))
    assert isinstance(mixed, Permutation)
    assert mixed.run == 8  # within each head, and in none as it was
    assert not torch.equal(mixed.order, torch.arange(32))
    assert len({tuple((run - run.min()).tolist()) for run in mixed.order.view(4, 8)}) == 4
    assert Rotate(matrix="permutation").misfit("stream", 92, 92) is None


def test_hadamard() -> None:
    found = Hadamard(block=16).op(Site("input", 48, 48, 1, (), None, None, 0))
    assert (found.block, found.signs.tolist()) == (16, [1] * 48)
    assert found == Hadamard(block=16).stays(48)
    assert Hadamard(block=32).misfit("input", 48, 48) == "48 inputs cannot be cut into runs of 32"
    with pytest.raises(ValidationError, match="take 16, 32, 64 or 128"):
        Hadamard(block=3)


@pytest.mark.parametrize("transform", [AWQ, Equalize, Exponents, Permute, Rotate, Smooth])
def test_edges_are_some_that_a_transform_works_on(transform: type[Transform]) -> None:
    with pytest.raises(ValidationError, match="nowhere to work: name edges"):
        transform(edges=())
    with pytest.raises(ValidationError, match=r"edges\.0"):
        transform(edges=("scores",))


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_nothing_is_done_where_nothing_is_quantized_or_nothing_was_seen(name: str) -> None:
    options = {"candidates": ["smooth", "hadamard"]} if name == "try" else {}
    transform: Transform = registry.load("transforms", name)(**options)
    if transform.kinds & {"stream", "input"} or isinstance(transform, TrainedTransform):
        return  # these choose without looking, or by training
    place, _ = site("product", transform, randn(6, 32), source=randn(32, 4))
    if transform.kinds == {"scores"}:  # nobody reads these
        place = replace(place, kind="scores", dim=8, source=lambda: randn(32, 32), readers=())
    else:
        assert transform.op(replace(place, readers=())) is None
    assert transform.op(place) is not None
    if transform.needs:
        assert transform.op(replace(place, stats=InputStats(32, transform.needs))) is None


def test_shifts_put_every_range_around_zero():
    """The middle of all that is read of a channel, whichever head of queries reads it."""
    place, x = site("heads", Shift(), randn(6, WIDE))
    amounts = Shift().op(place).amounts
    runs = x.view(50, HEADS, REPEAT, DIM)
    for head in range(HEADS):
        for j in range(DIM):
            read = [float(runs[t, head, r, j]) for t in range(50) for r in range(REPEAT)]
            assert float(amounts[head * DIM + j]) == pytest.approx((max(read) + min(read)) / 2, rel=1e-5, abs=1e-6)
