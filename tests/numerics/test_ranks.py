"""What processes tell each other, in two that have met."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from qtool.numerics.threads.ranks import ALONE, Ranks

CPU = torch.device("cpu")


def own(rank):
    """Tensors of a process: of every size of number, of several shapes, some without numbers."""
    return [
        torch.arange(6, dtype=torch.int8).view(2, 3) + rank,
        torch.full((rank, 3), 0.1, dtype=torch.float16),
        torch.tensor(1 / 3 + rank, dtype=torch.float64),
        torch.tensor([True, False, True][: rank + 1]),
        torch.randn(5 + rank, 7, generator=torch.Generator().manual_seed(rank)).T,
    ]


def exchanged(ranks):
    total = ranks.sum(torch.tensor([0.1, 1.0]) * (ranks.rank + 1))
    gathered = ranks.gather_tensors({"rank": ranks.rank}, own(ranks.rank), CPU)
    return (
        ranks.gather("ab"[ranks.rank]),
        ranks.broadcast(ranks.rank + 7),
        ranks.minimum(3 - ranks.rank),
        total,
        gathered,
    )


def test_each_process_gets_the_same(together):
    for everything, told, least, total, gathered in together(exchanged):
        assert everything == ["a", "b"]
        assert (told, least) == (7, 2)
        assert torch.equal(total, torch.tensor([0.1, 1.0]) + torch.tensor([0.2, 2.0]))
        for rank, (about, tensors) in enumerate(gathered):
            assert about == {"rank": rank}
            for found, given in zip(tensors, own(rank), strict=True):
                assert found.dtype == given.dtype
                assert torch.equal(found, given)


def test_one_alone_gets_its_own():
    tensors = own(1)
    assert ALONE.gather("a") == ["a"]
    assert ALONE.broadcast("a") == "a"
    assert ALONE.gather_tensors("a", tensors, CPU) == [("a", tensors)]
    assert ALONE.sum(tensors[0]) is tensors[0]
    assert ALONE.ended()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_shares_are_even_and_leave_nothing_out(size, count):
    ranks = [Ranks(rank, size) for rank in range(size)]
    shares = [list(range(count))[r.share(count)] for r in ranks]
    parts = [list(range(count))[slice(*r.part(count))] for r in ranks]
    assert sorted(chain(*shares)) == list(range(count))
    assert list(chain(*parts)) == list(range(count))
    for found in (shares, parts):
        assert max(map(len, found)) - min(map(len, found)) <= 1
    few = [len(list(range(count // 2))[r.share(count)]) for r in ranks]
    assert max(few) - min(few) <= 1
