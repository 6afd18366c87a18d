"""docs/rewrites.md: its cells are recipes that load, each measured once, and shown as measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables
from benchmarks.system import Measured
from qtool.recipe.load import load_recipe


@pytest.mark.parametrize("name", tables.TABLES)
def test_cells_are_recipes_and_differ(name):
    table = tables.TABLES[name]()
    cells = [one for line in table.lines.values() for one in line]
    assert all(len(line) == len(table.columns) for line in table.lines.values())
    assert len({one.key for one in cells}) == len(cells)
    loaded = {(one.variant, load_recipe(one.way.recipe, one.way.set).model_dump_json()) for one in cells}
    assert len(loaded) == len(cells)
    assert tables.TABLES[name].__doc__.count("https://arxiv.org/abs/") >= 1


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", tmp_path / "kept.json")
    asked = []

    def run(way, variant):
        asked.append((way, variant))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return Measured(kld=len(asked) / 7, megabytes=1, carrier="gguf")

    with pytest.raises(KeyboardInterrupt):
        list(tables.measure(run, ["eight-bits"]))
    found = dict(tables.measure(run, ["eight-bits"]))
    assert len(found) == 10
    assert len(asked) == 13
    known = json.loads((tmp_path / "kept.json").read_text())
    assert len(known) == 12
    assert known["off-grid fp8-dynamic"] == 0.1429
    header, rows = tables.rows("eight-bits")
    assert header == ("recipe", "off any grid", "with outliers")
    assert rows[0] == ("FP8, inputs by token", "**0.143**", "**0.286**")
    assert rows[1][1:] == ("0.571", "0.714")
    monkeypatch.setattr(tables, "KEPT", tmp_path / "none.json")
    assert tables.rows("eight-bits")[1][0] == ("FP8, inputs by token", "", "")
