"""Which of several models no other beats, and the page about them."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from qtool.report.comparison import Compared, compare, html, interval, layer_rows
from tests.report.test_render import HOSTILE, Page

SIZES = {"a": (100, 0.30), "b": (120, 0.10), "c": (130, 0.12), "d": (200, 0.01), "e": (210, 0.01), "f": (100, 0.30)}


@pytest.fixture
def entries(report):
    found = []
    for name, (nbytes, kld) in SIZES.items():
        evaluation = report.evaluations[0].model_copy(update={"kld_mean": kld, "kld_error": kld / 20})
        fields = {
            "source": name,
            "kind": "gguf",
            "nbytes": nbytes * 10**6,
            "bits_per_weight": 4.5,
            "errors": {"q": 20.0},
        }
        found.append(Compared(name=name, evaluation=evaluation, **fields))
    return found


def test_the_best_are_those_that_no_other_beats(entries):
    found = compare(entries[::-1])
    assert [e.name for e in found.entries] == ["a", "f", "b", "c", "d", "e"]
    assert found.best == ("a", "f", "b", "d")  # equal ones do not beat each other
    assert found.text == "evaluation.txt"


def test_another_text_does_not_compare(entries):
    other = entries[3].evaluation.model_copy(update={"text_sha256": "0" * 64, "text": "other.txt"})
    entries[3] = entries[3].model_copy(update={"evaluation": other})
    entries[2] = entries[2].model_copy(update={"evaluation": None})
    found = compare(entries)
    assert found.comparable == ("a", "f", "b", "e")
    assert "d" not in found.best
    page = html(found)
    assert "on other.txt, which does not compare" in page
    assert "not measured" in page


def test_marks_stand_where_the_numbers_say(entries):
    page = html(compare(entries))
    Page(page)
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"><title>(\w): ', page)
    assert len(marks) == 6
    at = {name: (float(x), float(y)) for x, y, name in marks}
    assert at["a"] == at["f"]
    assert (at["d"][0] - at["b"][0]) / (at["b"][0] - at["a"][0]) == pytest.approx(80 / 20, rel=0.01)
    assert (at["d"][1] - at["b"][1]) / (at["b"][1] - at["a"][1]) == pytest.approx(1 / 0.4771, rel=0.01)  # decades
    assert interval(entries[0].evaluation) == pytest.approx((0.3 * (1 - 0.098), 0.3, 0.3 * 1.098))


def test_names_are_no_markup(entries):
    entries[0] = entries[0].model_copy(update={"name": HOSTILE, "kind": HOSTILE})
    page = html(compare(entries))
    Page(page)
    assert HOSTILE not in page


def test_nothing_measured(entries):
    found = compare([e.model_copy(update={"evaluation": None}) for e in entries])
    assert (found.best, found.comparable) == ((), ())
    assert "Nothing was measured" in html(found)


def test_layers_that_differ_most_come_first(entries):
    layers = [
        {"x": ("q4_k", 20.0), "y": ("q4_k", 21.0), "z": ("kept", None)},
        {"x": ("q4_k", 20.5), "y": ("q6_k", 32.0)},
    ]
    told = [e.model_copy(update={"layers": own}) for e, own in zip(entries, layers, strict=False)]
    told[0] = told[0].model_copy(update={"speed": (123.4, 45.67)})
    rows = layer_rows(compare(told))
    assert rows == [("y", ["q4_k, 21.0", "q6_k, 32.0"]), ("x", ["q4_k, 20.0", "q4_k, 20.5"]), ("z", ["kept", "-"])]
    page = html(compare([*told, *entries[2:]]))
    assert page.index("<code>y</code>") < page.index("<code>x</code>") < page.index("<code>z</code>")
    assert "45.7</td>" in page
    assert layer_rows(compare([told[0], entries[2]])) == []
    assert "tokens/s" in page
    assert "tokens/s" not in html(compare(entries))


def test_an_exact_copy_leaves_room_for_the_others(entries):
    """A divergence of 1e-13 nats stands at the bottom of a plot whose labels do not overlap."""
    copied = entries[3].evaluation.model_copy(update={"kld_mean": 3e-13, "kld_error": 9e-15})
    entries[3] = entries[3].model_copy(update={"evaluation": copied})
    page = html(compare(entries))
    heights = {name: float(y) for y, name in re.findall(r'cy="([\d.]+)" r="[\d.]+"><title>(\w): ', page)}
    assert (heights["d"] - heights["b"]) / (heights["b"] - heights["a"]) == pytest.approx(5 / 0.4771, rel=0.01)
    labels = re.findall(r'<text x="[\d.]+" y="([\d.]+)" dy="0.35em" text-anchor="end">([^<]+)</text>', page)
    assert [text for _, text in labels] == ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1"]
    places = [float(y) for y, _ in labels]
    assert all(low - high > 22 for low, high in pairwise(places))
    assert '<td class="n">&lt; 1e-06</td>' in page
