"""What errors say, and which exit codes they have."""

from __future__ import annotations

import re

import pytest

from qtool import errors
from qtool.errors import MissingExtra, PlanError, QtoolError, one_line, printable, suggestion


@pytest.mark.parametrize(
    ("clauses", "line"),
    [
        ({}, "the shard is cut"),
        ({"wanted": 8}, "the shard is cut: wanted 8"),
        ({"found": 0}, "the shard is cut: found 0"),
        ({"wanted": 8, "found": 7, "hint": "fetch it again"}, "the shard is cut: wanted 8, found 7; fetch it again"),
        ({"hint": "fetch it again"}, "the shard is cut; fetch it again"),
    ],
    ids=str,
)
def test_a_line_says_what_was_wanted_and_found_and_what_to_do(clauses, line):
    assert str(QtoolError("the shard is cut", **clauses)) == line


def test_several_problems_stand_on_a_line_each():
    assert str(PlanError(["a: x"], "it does not fit")) == "it does not fit: a: x"
    assert str(PlanError(["a: x", "b: y"], "it does not fit")) == "it does not fit: 2 problems\n  a: x\n  b: y"


def test_every_class_has_an_exit_code_of_its_own_which_the_docstring_says():
    listed = dict(re.findall(r"(\w+) +(\d+)  ", errors.__doc__))
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, QtoolError)]
    assert {c.__name__: str(c.exit_code) for c in classes if c is not errors.Problems} == listed
    assert len(set(listed.values())) == len(listed)


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    error = MissingExtra("pyarrow", "data", "reading .parquet")
    hint = "install it with: pip install 'datasets>=3.0' 'pyarrow>=15.0'"
    assert str(error) == f"reading .parquet needs the package pyarrow; {hint}"


def test_near_spellings_come_before_other_advice():
    assert suggestion("gtpq", ["rtn", "gptq"]) == "did you mean 'gptq'?"
    assert suggestion("xyz", ["rtn", "gptq"]) == "known: gptq, rtn"
    assert suggestion("xyz", ["rtn", "gptq"], "choose one") == "choose one"


def test_what_other_libraries_say_becomes_one_short_line():
    assert one_line(ValueError(" first\n  second\tthird ")) == "first second third"
    assert one_line(ValueError("x" * 500)) == "x" * 200
    assert one_line(ValueError()) == "ValueError"


def test_what_would_move_a_cursor_is_escaped():
    assert printable("größe\x1b[2J\n\u202e") == "größe\\x1b[2J\\n\\u202e"
