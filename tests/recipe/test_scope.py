"""Which blocks and which models a rule is for."""

from __future__ import annotations

import dataclasses

import pytest

from qtool.recipe.scope import ModelFacts, When, chosen

FACTS = ModelFacts(blocks=32, gqa=4, experts=8, tied=False, calibrated=True)


def use_more_bits(i, n):
    """As llama.cpp has it, in C's integer arithmetic; all operands of `/` are positive here."""
    remainder = i - n // 8
    return i < n // 8 or i >= 7 * n // 8 or (remainder % 3 == 2 if remainder >= 0 else -(-remainder % 3) == 2)


@pytest.mark.parametrize("n", [*range(1, 50), 80, 126])
def test_the_usual_three_are_llama_cpps_use_more_bits(n):
    assert chosen(("first 1/8", "last 1/8", "every 3rd"), n) == tuple(i for i in range(n) if use_more_bits(i, n))


def test_of_32_blocks_they_are_these():
    wanted = (0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31)
    assert chosen(("first 1/8", "last 1/8", "every 3rd"), 32) == wanted


@pytest.mark.parametrize(
    ("entries", "count", "wanted"),
    [
        (["first 4"], 30, [0, 1, 2, 3]),
        (["first 4"], 2, [0, 1]),
        (["last 4"], 30, [26, 27, 28, 29]),
        (["last 4"], 2, [0, 1]),
        (["first 1/16"], 31, [0]),
        (["first 1/16"], 15, []),
        (["first 3/8"], 30, list(range(11))),
        (["last 1/8"], 30, [26, 27, 28, 29]),
        (["last 3/8"], 30, list(range(18, 30))),
        (["first 1/1"], 3, [0, 1, 2]),
        (["last 1/1"], 3, [0, 1, 2]),
        (["0-3"], 30, [0, 1, 2, 3]),
        (["7"], 30, [7]),
        (["5", "2", "2-3"], 30, [2, 3, 5]),
        (["every 2nd"], 7, [1, 3, 5]),
        (["every 1st"], 3, [0, 1, 2]),
        (["every 4th"], 3, []),
        (["0-1", "every 2nd"], 8, [0, 1, 3, 5, 7]),
        (["every 2nd", "0-1"], 8, [0, 1, 3, 5, 7]),
        (["every 2nd", "every 2nd"], 8, [1, 2, 3, 5, 6, 7]),
        (["40-41"], 30, [40, 41]),
    ],
)
def test_entries(entries, count, wanted):
    assert list(chosen(entries, count)) == wanted


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"experts": "8"}, True),
        ({"experts": "9"}, False),
        ({"experts": "!=8"}, False),
        ({"experts": "!=0"}, True),
        ({"gqa": ">=4"}, True),
        ({"gqa": ">=5"}, False),
        ({"gqa": ">4"}, False),
        ({"gqa": "<5"}, True),
        ({"gqa": "<4"}, False),
        ({"gqa": "<=4"}, True),
        ({"blocks": "32"}, True),
        ({"tied": False}, True),
        ({"tied": True}, False),
        ({"calibrated": True}, True),
        ({"calibrated": False}, False),
        ({"gqa": ">=4", "tied": True}, False),
        ({"gqa": ">=4", "tied": False, "experts": "8", "calibrated": True, "blocks": "32"}, True),
    ],
    ids=str,
)
def test_conditions(condition, holds):
    assert When(**condition).holds(FACTS) is holds


def test_everything_known_can_be_asked_for():
    assert set(When.model_fields) == {field.name for field in dataclasses.fields(ModelFacts)}
