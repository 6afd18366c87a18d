"""Pictures read back as XML: marks must stand where the axes' own tick labels say that their values are."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from qtool.report.plots import Point, Series, grid, histogram, lines, small, ticks

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg):
    return ElementTree.fromstring(svg)


def scale(root, axis):
    """Value of a coordinate, from the tick labels at the left ("y") or below ("x")."""
    anchor = {"x": "middle", "y": "end"}[axis]
    labels = [
        t for t in root.iter(f"{SVG}text") if t.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.]+", t.text)
    ]
    at, value = [float(t.get(axis)) for t in labels], [float(t.text) for t in labels]
    slope, offset = np.polyfit(at, value, 1)
    return lambda pixels: slope * pixels + offset


def test_points_stand_at_their_values():
    points = [Point(x, 15 + 3 * (-1) ** x + x / 7, f"layer {x}", x == 4) for x in range(30)]
    root = parse(lines([Series("down", "c6", points)], "decoder block", "dB", "errors"))
    x_of, y_of = scale(root, "x"), scale(root, "y")
    circles = list(root.iter(f"{SVG}circle"))
    found = [(x_of(float(c.get("cx"))), y_of(float(c.get("cy")))) for c in circles]
    np.testing.assert_allclose(found, [(p.x, p.y) for p in points], atol=0.02)
    assert [c.find(f"{SVG}title").text for c in circles] == [p.title for p in points]
    assert [i for i, c in enumerate(circles) if c.get("class") == "ring"] == [4]
    path = [tuple(map(float, xy.split(","))) for xy in root.find(f".//{SVG}polyline").get("points").split()]
    assert path == [(float(c.get("cx")), float(c.get("cy"))) for c in circles]


def test_a_small_plot_goes_from_edge_to_edge():
    series = {"c0": [(0, 5.0), (10, 3.0), (40, 1.0)], "c2": [(0, 4.0), (40, 2.0)]}
    given = [Series(style, style, [Point(x, y, f"{x}", y == 2.0) for x, y in at]) for style, at in series.items()]
    root = parse(small(given, "losses"))
    width, height = map(float, root.get("viewBox").split()[2:])
    for group in root.iter(f"{SVG}g"):
        circles = list(group.iter(f"{SVG}circle"))
        found = [(float(c.get("cx")), float(c.get("cy"))) for c in circles]
        own = series[group.get("class").removeprefix("series ")]
        shares = [((x / 40 + 0.06) / 1.12, ((y - 1) / 4 + 0.06) / 1.12) for x, y in own]
        wanted = [(3 + x * (width - 6), height - 3 - y * (height - 6)) for x, y in shares]
        np.testing.assert_allclose(found, wanted, atol=0.006)
        assert [c.get("class") for c in circles if c.find(f"{SVG}title").text == "40"] == [
            "ring" if group.get("class") == "series c2" else None
        ]


def test_bars_are_as_high_as_counts_and_stand_on_each_other():
    generator = np.random.default_rng(0)
    values = {"q": generator.normal(20, 2, 60), "down": generator.normal(16, 3, 90)}
    root = parse(histogram([Series(n, n, list(v)) for n, v in values.items()], "dB", "layers", "distribution"))
    x_of, y_of = scale(root, "x"), scale(root, "y")
    bars = {g.get("class"): list(g) for g in root.iter(f"{SVG}g")}
    tops = {}
    for name in ("bars q", "bars down"):
        for bar in bars[name]:
            x, y, width, height = (float(bar.get(k)) for k in ("x", "y", "width", "height"))
            left, right = x_of(x - 0.7), x_of(x + width + 0.7)
            mine = values[name.split()[1]]
            inside = np.sum((mine >= round(left)) & (mine < round(right)))
            assert right - left == pytest.approx(1, abs=0.02)
            assert y_of(y) - y_of(y + height) == pytest.approx(inside, abs=0.05)
            assert y_of(y + height) == pytest.approx(tops.get(round(left), 0), abs=0.05)
            tops[round(left)] = y_of(y)
    assert sum(tops.values()) == pytest.approx(150, abs=1)


def test_a_map_has_a_cell_for_each_entry_in_its_row_and_column():
    rows = {"q": {0: ("b0", "first"), 7: ("b4", "eighth")}, "down": {3: ("kept", "kept <&>")}}
    root = parse(grid(rows, 8, "decoder block", "bits"))
    x_of = scale(root, "x")
    labels = {t.text: float(t.get("y")) for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"}
    cells = {r.find(f"{SVG}title").text: r for r in root.iter(f"{SVG}rect")}
    for row, entries in rows.items():
        for column, (style, title) in entries.items():
            cell = cells.pop(title)
            x, y, width, height = (float(cell.get(k)) for k in ("x", "y", "width", "height"))
            assert cell.get("class") == style
            assert x_of(x + width / 2) == pytest.approx(column, abs=0.01)
            assert y < labels[row] < y + height
    assert not cells


@pytest.mark.parametrize(
    ("low", "high", "count", "want"),
    [(0, 29, 8, [0, 5, 10, 15, 20, 25]), (-3, 3, 6, [-3, -2, -1, 0, 1, 2, 3]), (0.11, 0.39, 3, [0.2, 0.3])],
)
def test_ticks_are_round_and_inside(low, high, count, want):
    np.testing.assert_allclose(ticks(low, high, count), want)


@pytest.mark.parametrize("values", [[7.0], [7.0, 7.0], [0.0], [-3.0, -3.0]], ids=str)
def test_equal_values_have_a_picture_too(values):
    points = [Point(float(x), y, "") for x, y in enumerate(values)]
    assert len(list(parse(lines([Series("q", "c0", points)], "x", "y", "l")).iter(f"{SVG}circle"))) == len(values)
    assert len(list(parse(small([Series("q", "c0", points)], "l")).iter(f"{SVG}circle"))) == len(values)
    assert len(list(parse(histogram([Series("q", "c0", values)], "x", "y", "l")).iter(f"{SVG}rect"))) == 1
