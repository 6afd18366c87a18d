"""Whatever the text, loading it gives a recipe or says what is wrong: never a traceback."""

from __future__ import annotations

import warnings

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.errors import RecipeError
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Recipe
from tests.recipe.shapes import SHIPPED

TEXTS = [entry.path.read_text() for entry in SHIPPED]
PIECES = [
    "*",
    "&a",
    "*a",
    "!!int",
    "\t",
    "\n",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "|",
    ">",
    "#",
    "%",
    "@",
    "?",
    "<<: ",
]
PIECES += [
    "\\",
    "\0",
    "\ud800",
    "\ufeff",
    "é",
    "0x",
    "0b_",
    ".inf",
    ".nan",
    "~",
    "true",
    "2026-01-01",
    "1:30",
    "re:(",
    "re:[",
]
PIECES += [
    "---\n",
    "...\n",
    "int4-g0",
    "int9-g1",
    "type: int",
    "extends: r.yaml\n",
    "extends: w8a16\n",
    "layers: ",
    "keep: true",
]
PIECES += [
    "-1",
    "1e999",
    "9" * 5000,
    "0x" + "f" * 6000,
    "gptq",
    "fallback: error",
    "q4_0",
    "match: ",
    "weights: ",
    "export: [{to: qtool}]\n",
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(PIECES)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"

    def load(text, overrides=()):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            recipe = load_recipe("r.yaml", overrides)
        except RecipeError as error:
            assert error.problems
            assert all(line.isprintable() and len(line) < 1000 for line in error.problems)
        else:
            assert isinstance(recipe, Recipe)

    return load


@QUICK
@given(data=st.data())
def test_edited_text(load, data):
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(st.sampled_from(["", *PIECES])) + text[start + cut :]
    load(text)


@QUICK
@given(data=st.data())
def test_any_value_at_any_key(load, data):
    recipe = yaml.safe_load(data.draw(st.sampled_from(TEXTS)))
    place, keys = recipe, list(recipe)
    while True:
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place, keys = inner, list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    place[key] = data.draw(values)
    load(yaml.safe_dump(recipe, allow_unicode=False))


@QUICK
@given(
    flag=st.lists(
        st.sampled_from(["layers", "0", "1", "weights", "method", "calibration", "data", "samples", ".", "=", *PIECES])
    )
)
def test_any_flag(load, flag):
    load(TEXTS[0], ["".join(flag)])


def test_the_texts_are_good_before_they_are_edited(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for entry in SHIPPED:
            assert load_recipe(entry.name).name == entry.name
