"""Batches in step: who waits where, what is kept, and that starting anew gives the same."""

from __future__ import annotations

import threading

import pytest

from qtool.calibrate.steps import InStep

WAYS = {0: "abd", 1: "acd", 2: "d", 3: ""}
"""Places that each batch comes by."""


def walk(suspend, threads):
    """(what happened between one place and the next, what arrived in order, how often each batch was begun)."""
    log, arrived, begun = [set()], [], dict.fromkeys(WAYS, 0)

    def run(batch):
        begun[batch.start] += 1
        for place in WAYS[batch.start]:
            if place not in flow.passed:
                log[-1].add(f"{batch.start} at {place}")
                flow.wait(place, batch.start)
        log[-1].add(f"{batch.start} done")

    batches = [slice(i, i + 1) for i in WAYS]
    flow = InStep(
        run,
        batches,
        "abcd",
        lambda place, seen, batch: arrived.append((seen, place, batch.start)),
        (threads, 1),
        suspend,
    )
    for place in flow:
        arrived.append(place)
        log.append(set())
    return log, arrived, begun


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("suspend", [True, False])
def test_all_that_come_by_a_place_wait_for_each_other(suspend, threads):
    log, arrived, _ = walk(suspend, threads)
    assert log == [
        {"0 at a", "1 at a", "2 at d", "3 done"},
        {"0 at b", "1 at c"},
        {"0 at d"},
        {"1 at d"},
        {"0 done", "1 done", "2 done"},
    ]
    at = [(0, "a"), (1, "a"), (2, "d"), "a", (0, "b"), (1, "c"), "b", (0, "d"), "c", (1, "d"), "d"]
    assert arrived == [(*each, each[0]) if isinstance(each, tuple) else each for each in at]


@pytest.mark.parametrize("threads", [1, 2])
def test_only_without_suspension_a_batch_starts_anew(threads):
    assert walk(True, threads)[2] == {0: 1, 1: 1, 2: 1, 3: 1}
    assert walk(False, threads)[2] == {0: 4, 1: 4, 2: 2, 3: 1}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_in_a_batch_is_raised_to_whoever_iterates(threads):
    def run(batch):
        flow.wait("a")
        raise ValueError("in the batch")

    flow = InStep(run, [slice(0, 1), slice(1, 2)], ["a"], lambda *_: None, (threads, 1))
    with pytest.raises(ValueError, match="in the batch"):
        list(flow)


def test_batches_run_side_by_side():
    both = threading.Barrier(2, timeout=10)

    def run(_batch):
        both.wait()

    flow = InStep(run, [slice(0, 1), slice(1, 2)], [], lambda *_: None, (2, 1))
    assert list(flow) == []
