"""docs/rewrites.md: its cells are recipes that load, and are shown as measured."""

from __future__ import annotations

import pytest

from benchmarks import cells, curves, tables
from benchmarks.cells import Measured
from scripts import docs


@pytest.mark.parametrize("name", tables.TABLES)
def test_cells_are_recipes_and_differ(name):
    table = tables.TABLES[name]()
    lines = list(table.lines.values())
    assert all(len(line) == len(table.columns) for line in lines)
    keys = {(one.key, column.shows) for line in lines for column, one in zip(table.columns, line, strict=True)}
    shown = [column.label for column in table.columns]
    assert len(set(shown)) == len(shown)
    found = {one.key: one for line in lines for one in line}
    loaded = {(one.variant, one.way.loaded().model_dump_json()) for one in found.values()}
    assert len(loaded) == len(found)
    assert len(keys) >= len(found)
    assert "https://arxiv.org/abs/" in tables.TABLES[name].__doc__


def test_the_least_of_a_column_is_bold_and_what_is_unknown_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    for number, one in enumerate(list(dict.fromkeys(tables.cells(["eight-bits"])))[:3], start=1):
        cells.keep(one.key, Measured(kld=number / 7, code=number / 3, megabytes=1, carrier="gguf"))
    header, rows = tables.rows("eight-bits")
    assert header == ("recipe", "prose", "source code", "prose, with outliers", "source code, with outliers")
    assert rows[0] == ("FP8, inputs by token", "**0.143**", "**0.333**", "**0.286**", "**0.667**")
    assert rows[1] == ("FP8, static inputs", "0.429", "1", "", "")


def test_plots_show_what_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(curves, "FOLDER", tmp_path)
    curves.write()
    assert list(tmp_path.glob("*.svg")) == []
    assert "svg" not in docs.study("strengths")
    for name, plot in curves.PLOTS.items():
        table = tables.TABLES[plot.table]()
        drawn = table.lines if plot.lines else [column.label for column in table.columns]
        assert set(plot.curves) <= set(drawn), name
    for number, one in enumerate(tables.cells(["strengths"])[3:9]):  # alpha 0 and 0.25
        cells.keep(one.key, Measured(kld=0.1 + number, code=1, megabytes=1, carrier="gguf"))
    curves.write()
    (picture,) = tmp_path.glob("*.svg")
    text = picture.read_text()
    assert picture.name == "rewrites-strengths.svg"
    assert docs.study("strengths").endswith("![Divergence over the strength of smoothing](rewrites-strengths.svg)")
    assert "svg" not in docs.study("ranks")
    assert text.count("<circle") == 6
    assert "W8A8, outliers, 0.25: 4.1 nats per token" in text
