"""A run that is killed at any moment continues, and ends in the same bytes."""

from __future__ import annotations

import pytest

from tests.pipeline.kills import RECIPES, interrupted, wrong


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RECIPES)
def test_killed_before_and_after_every_name_it_ends_in_the_same_bytes(name, tiny_checkpoint, tmp_path):
    parts = {"data-free": 1, "learned": 7}.get(name, 2)  # of the moments one in so many; `make kills` has all
    found = interrupted(tiny_checkpoint("llama"), name, tmp_path, 0, parts)
    assert len(found["wanted"]) > 3
    assert len(found["runs"]) > 30 // parts
    assert found["kinds"].count("os.rename") > 10
    assert [(run, why) for run in found["runs"] if (why := wrong(run, found["wanted"]))] == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"found": {"a": "2"}}, "other bytes in a"),
        ({"found": {}}, "other bytes in a"),
        ({"left": [".out.x.partial", "older", "out", "out.work"]}, "out.work is left"),
        ({"codes": [0]}, "it was not ended"),
        ({"codes": [-9, 1]}, "it ended with code 1"),
        ({}, None),
    ],
)
def test_what_must_not_happen_is_seen(change, why):
    good = {"found": {"a": "1"}, "left": [".x", "older", "out"], "codes": [-9, 0]}
    assert wrong(good | change, {"a": "1"}) == why
