"""docs/rewrites.md: plots of its tables, from what `cells` keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import tables
from benchmarks.cells import known
from benchmarks.page import framed
from qtool.report.plots import Point, Series

FOLDER = Path(__file__).parents[1] / "docs"


class Plot(NamedTuple):
    """A table as curves of divergence.

    Attributes:
        table: its name.
        curves: which of its columns are drawn, or of its lines where these are the curves: label -> name in the plot.
        x_title: what changes along a curve.
        at: the place of a line, or column, on the axis by its label; None: it has none.
        lines: whether curves are lines of the table.
        label: what is shown.
    """

    table: str
    curves: Mapping[str, str]
    x_title: str
    at: Callable[[str], float | None]
    lines: bool
    label: str


def number(label: str) -> float | None:
    """The first number of a label."""
    text = label.split()[0]
    return float(text) if text.replace(".", "", 1).isdigit() else None


def percent(label: str) -> float | None:
    """A strength in percent."""
    found = number(label)
    return None if found is None else 100 * found


PLOTS = {
    "strengths": Plot(
        "strengths",
        {"W8A8, INT8": "W8A8", "W8A8, INT8, with outliers": "W8A8, outliers", "W4A16, groups of 64": "W4A16"},
        "alpha in percent",
        percent,
        lines=False,
        label="Divergence over the strength of smoothing",
    ),
    "calibrations": Plot(
        "calibrations",
        {
            "topics of Python's help": "topics",
            "docstrings, of which others are evaluated": "docstrings",
            "source code": "code",
            "sampled from the model": "sampled",
        },
        "log2 of samples of 512 tokens",
        lambda label: math.log2(number(label) or 1),
        lines=True,
        label="Divergence of AWQ over the size of calibration sets",
    ),
    "low-bits": Plot(
        "low-bits",
        {"RTN": "RTN", "GPTQ": "GPTQ", "learned from GPTQ, 70 steps": "learned", "decoupleQ, offsets": "decoupleQ"},
        "bits",
        number,
        lines=True,
        label="Divergence of methods over bits",
    ),
    "ranks": Plot(
        "ranks",
        {
            "RTN, 3 bits, plain": "RTN, 3 bits, plain",
            "RTN, 3 bits, whitened": "whitened",
            "GPTQ, 3 bits, whitened": "GPTQ, 3 bits",
            "GPTQ, 2 bits, whitened": "GPTQ, 2 bits",
        },
        "rank",
        number,
        lines=False,
        label="Divergence over the rank of a branch",
    ),
}
"""docs/rewrites-NAME.svg."""


def draw(plot: Plot) -> str | None:
    """A picture, in which what nobody measured is missing; None: all of it."""
    table, found = tables.TABLES[plot.table](), known()
    columns = [column.label for column in table.columns]
    series = []
    for i, (curve, name) in enumerate(plot.curves.items()):
        points = []
        for label, line in table.lines.items():
            for column, cell in zip(columns, line, strict=True):
                own, place = (label, column) if plot.lines else (column, label)
                x = plot.at(place)
                if own == curve and x is not None and cell.key in found:
                    kld = found[cell.key].kld
                    points.append(Point(x, math.log10(kld), f"{name}, {place}: {kld:.3g} nats per token"))
        series.append(Series(name, f"c{i}", points))
    shown = [each for each in series if each.values]
    return framed(shown, plot.x_title, "log10 of nats", plot.label) if shown else None


def file_of(table: str) -> str:
    """What the picture of a table is called."""
    return f"rewrites-{table}.svg"


def write() -> None:
    """Writes all pictures beside the page."""
    for name, plot in PLOTS.items():
        if picture := draw(plot):
            (FOLDER / file_of(name)).write_text(picture + "\n", encoding="utf-8")
