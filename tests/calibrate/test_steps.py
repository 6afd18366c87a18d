"""Batches in step: who waits where, what is kept, and that starting anew gives the same."""

from __future__ import annotations

import pytest

from qtool.calibrate.steps import InStep

WAYS = {0: "abd", 1: "acd", 2: "d", 3: ""}
"""Places that each batch comes by."""


def walk(suspend):
    """(what happened, in order; how often each batch was begun)."""
    log, begun = [], dict.fromkeys(WAYS, 0)

    def run(batch):
        begun[batch.start] += 1
        for place in WAYS[batch.start]:
            if place not in flow.passed:
                log.append(f"{batch.start} at {place}")
                flow.wait(place)
        log.append(f"{batch.start} done")

    flow = InStep(run, [slice(i, i + 1) for i in WAYS], "abcd", suspend)
    for place in flow:
        log.append(f"all at {place}")
    return log, begun


@pytest.mark.parametrize("suspend", [True, False])
def test_all_that_come_by_a_place_wait_for_each_other(suspend):
    log, _ = walk(suspend)
    assert log == [
        *("0 at a", "1 at a", "2 at d", "3 done", "all at a"),
        *("0 at b", "1 at c", "all at b"),
        *("0 at d", "all at c"),
        *("1 at d", "all at d"),
        *("0 done", "1 done", "2 done"),
    ]


def test_only_without_suspension_a_batch_starts_anew():
    assert walk(True)[1] == {0: 1, 1: 1, 2: 1, 3: 1}
    assert walk(False)[1] == {0: 4, 1: 4, 2: 2, 3: 1}


def test_a_failure_in_a_batch_is_raised_to_whoever_iterates():
    def run(batch):
        flow.wait("a")
        raise ValueError("in the batch")

    flow = InStep(run, [slice(0, 1)], ["a"])
    with pytest.raises(ValueError, match="in the batch"):
        list(flow)
