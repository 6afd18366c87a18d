"""Work side by side: in order, on all threads, none of them oversubscribed, none left behind by a failure."""

from __future__ import annotations

import threading

import pytest
import torch

from qtool.numerics.threads.parallel import over_rows, row_shares, shares, side_by_side


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request, use_threads):
    """How many torch may use within the test."""
    use_threads(request.param)
    return request.param


def test_results_keep_their_order(threads):
    assert side_by_side(lambda i: i * i, list(range(50))) == [i * i for i in range(50)]
    assert side_by_side(lambda i: i, []) == []


def test_pieces_share_the_threads_that_torch_may_use(threads):
    seen = side_by_side(lambda _: (threading.get_ident(), torch.get_num_threads()), [0, 1])
    assert [each for _, each in seen] == ([max(1, threads // 2)] * 2)
    assert (len({thread for thread, _ in seen}) == 2) == (threads > 1)
    assert torch.get_num_threads() == threads
    assert shares(2, torch.device("meta")) == (1, threads)


def test_work_within_work_ends(threads):
    def inner(i):
        return sum(side_by_side(lambda j: i + j, [1, 2, 3]))

    assert side_by_side(inner, [10, 20, 30]) == [36, 66, 96]


def test_rows_are_shared_out_once(threads):
    for rows in (1, 2, 3, 10):
        seen = []
        over_rows(lambda start, stop, seen=seen: seen.extend(range(start, stop)), rows)
        assert sorted(seen) == list(range(rows))
        assert len(row_shares(rows)) == min(threads, rows)


def test_a_failure_is_raised_and_what_waits_is_left_out(use_threads):
    begun = []

    def work(i):
        begun.append(i)
        if i == 0:
            raise ValueError("first")

    use_threads(2)
    with pytest.raises(ValueError, match="first"):
        side_by_side(work, list(range(100)))
    assert side_by_side(lambda i: i, [1, 2]) == [1, 2]
    assert len(begun) < 10
