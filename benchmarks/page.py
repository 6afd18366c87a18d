"""docs/study.md: its tables, between markers, and its plots, from what `study` measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.comparisons import EIGHT_BITS, PAIRS, TABLES, VARIANTS, Run, Table
from benchmarks.study import CONTEXT
from benchmarks.tensors import Pair
from qtool.report import plots
from qtool.report.plots import Point, Series
from scripts.docs import table

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
PART = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- table ends -->)", re.DOTALL)
CROSSOVERS = {"MXFP8": 7.55, "MXFP6": 1.96, "MXFP4": 2.04, "NVFP4": 2.39}
"""At which crest factor both formats of a pair are equal for normal numbers: https://arxiv.org/abs/2510.25602."""
KINDS = {"weight": "weights", "input": "inputs"}
SCARCE = 100
"""Blocks that a bin of crest factors needs to be shown."""
LEGEND = 26
"""Height of the line above a plot that says what is drawn."""
STYLE = """
svg { --ink: #5c6670; --line: #dfe4e9; --c0: #4269d0; --c1: #16a2a8; --c2: #e5533d; --c3: #8f6bd6; }
@media (prefers-color-scheme: dark) {
svg { --ink: #9aa5b0; --line: #2e353c; --c0: #7593ec; --c1: #4cc4c8; --c2: #f27c69; --c3: #b195ee; } }
text { fill: var(--ink); font: 12.5px system-ui, sans-serif; }
.grid { stroke: var(--line); } .axis { stroke: var(--ink); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
polyline { fill: none; stroke: var(--c); stroke-width: 1.8; } circle, rect { fill: var(--c); }
"""

MISSING = "?"
Found = Mapping[str, Any]
"""What `study` returns; what is missing is shown as such."""


def write(found: Found) -> None:
    """Writes the page's tables anew, and its plots beside it."""
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name, draw in PLOTS.items():
        (PAGE.parent / f"study-{name}.svg").write_text(draw(found) + "\n", encoding="utf-8")


def rendered(text: str, found: Found) -> str:
    """A page with its tables made anew."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]](found)}\n{part[4]}", text)


def conditions(found: Found) -> str:
    """How much was measured."""
    keys = ("chunks", "device", "torch")
    told = {variant: found.get("conditions", {}).get(variant, {}) for variant in VARIANTS}
    rows = [(variant, *(str(known.get(key, MISSING)) for key in keys)) for variant, known in told.items()]
    return table(("model", f"chunks of {CONTEXT} tokens", "device", "torch"), rows)


def divergences(shown: Table, found: Found) -> str:
    """Mean KL divergence, the least of rivals in bold."""
    columns = [(i, variant) for i in range(len(shown.headings)) for variant in VARIANTS]
    best: dict[tuple[Any, ...], float] = {}
    for row in shown.rows:
        for column in columns:
            place, value = (row.rival, *column), divergence(row.runs[column[0]], column[1], found)
            best[place] = min(value, best.get(place, value))
    lines = []
    for row in shown.rows:
        cells = []
        for column in columns:
            value = divergence(row.runs[column[0]], column[1], found)
            cells.append(bold(f"{value:.3g}" if value < math.inf else MISSING, value == best[(row.rival, *column)]))
        lines.append((*row.labels, *cells))
    header = (*shown.labels, *(f"{shown.headings[i]}, {variant}" for i, variant in columns))
    return table(header, lines)


def divergence(run: Run, variant: str, found: Found) -> float:
    """Of a run; infinite if nobody measured it."""
    return float(found.get(run.key(variant), math.inf))


def bold(text: str, wanted: bool) -> str:
    """As Markdown has it."""
    return f"**{text}**" if wanted and text != MISSING else text


def records(found: Found, variant: str, kind: str) -> list[dict[str, Any]]:
    """What was measured of single tensors."""
    return [r for r in found.get(variant, {}).get("tensors", ()) if r["kind"] == kind]


def columns_of(found: Found) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, tensors) of each kind and variant."""
    return [(f"{KINDS[kind]}, {variant}", records(found, variant, kind)) for kind in KINDS for variant in VARIANTS]


def pairs(found: Found) -> str:
    """Mean decibels of both formats, and in how many tensors the integers have more."""
    columns = columns_of(found)

    def cell(pair: Pair, tensors: Sequence[dict[str, Any]]) -> str:
        if not tensors:
            return MISSING
        integers, floats = ([r["decibels"][name] for r in tensors] for name in pair[:2])
        share = fmean(a > b for a, b in zip(integers, floats, strict=True))
        return f"{fmean(integers):.1f} / {fmean(floats):.1f}, {share:.0%}"

    lines = [(f"{p.integer} / {p.float}", *(cell(p, tensors) for _, tensors in columns)) for p in PAIRS]
    return table(("dB, INT wins", *(heading for heading, _ in columns)), lines)


def crests(found: Found) -> str:
    """Crest factors of blocks, and where integers and floats are equal."""
    columns = columns_of(found)
    lines = []
    for pair in PAIRS:
        measured = [crossing(found, variant, pair) for variant in VARIANTS]
        means = (f"{fmean(r['crests'][str(pair.block)] for r in t):.2f}" if t else MISSING for _, t in columns)
        lines.append((f"{pair.integer} / {pair.float}", f"{CROSSOVERS[pair.float]:.2f}", *measured, *means))
    equal = ("equal at, in theory", *(f"equal at, {variant}" for variant in VARIANTS))
    return table(("pair", *equal, *(heading for heading, _ in columns)), lines)


def curve(found: Found, variant: str, pair: Pair) -> list[tuple[float, float, int]]:
    """(crest factor, decibels that the integers have more than the floats, blocks) of each bin with enough blocks."""
    bins = found.get(variant, {}).get("crests", {}).get(pair.float, ())
    return [(at, 10 * math.log10(b / a), n) for at, a, b, n in bins if n >= SCARCE and a > 0 and b > 0]


def crossing(found: Found, variant: str, pair: Pair) -> str:
    """The crest factor at which the integers' lead ends; "> n" if it lasts to the last bin."""
    points = curve(found, variant, pair)
    if not points:
        return MISSING
    behind = next((i for i, (_, lead, _) in enumerate(points) if lead < 0), None)
    if not behind:
        return f"< {points[0][0]:.2f}" if behind == 0 else f"> {points[-1][0]:.2f}"
    (x, y, _), (x1, y1, _) = points[behind - 1 : behind + 1]
    return f"{x + (x1 - x) * y / (y - y1):.2f}"


def eight_bits(found: Found) -> str:
    """Mean decibels of formats of 8 bits, and in how many tensors each is the best."""
    places = {"weight": ("channel", "tensor"), "input": ("token", "tensor")}
    header, columns = ["elements"], []
    for kind, groups in places.items():
        for group in groups:
            for variant in VARIANTS:
                header.append(f"{KINDS[kind]} per {group}, {variant}")
                columns.append((group, records(found, variant, kind)))
    lines = []
    for element in EIGHT_BITS:
        cells = [element]
        for group, tensors in columns:
            names = [f"{each}, {group}" for each in EIGHT_BITS]
            wins = [max(names, key=r["decibels"].__getitem__) == f"{element}, {group}" for r in tensors]
            mean = fmean(r["decibels"][f"{element}, {group}"] for r in tensors) if tensors else 0.0
            cells.append(f"{mean:.1f}, {fmean(wins):.0%}" if tensors else MISSING)
        lines.append(cells)
    return table(header, lines)


PARTS: dict[str, Callable[[Found], str]] = {
    "conditions": conditions,
    "pairs": pairs,
    "crests": crests,
    "eight-bits-tensors": eight_bits,
    **{name: partial(divergences, shown) for name, shown in TABLES.items()},
}
"""Every table of the page."""


def leads(found: Found) -> str:
    """Decibels that integers have more than floats over the crest factor of blocks, outliers included."""
    series = []
    for i, pair in enumerate(PAIRS):
        points = [
            Point(at, lead, f"crest factor {at:.2f}: {lead:+.2f} dB, {n} blocks")
            for at, lead, n in curve(found, "outliers", pair)
        ]
        series.append(Series(f"{pair.integer} over {pair.float}", f"c{i}", points))
    return framed(series, "crest factor of a block", "dB", "Decibels that integers are ahead of floats")


def over_depth(variant: str) -> Callable[[Found], str]:
    """Decibels that INT8 has more than E4M3 in inputs, token by token, over depth."""

    def draw(found: Found) -> str:
        tensors = records(found, variant, "input")
        roles = dict.fromkeys(r["role"] for r in tensors)
        series = []
        for i, role in enumerate(roles):
            points = [
                Point(r["block"], lead, f"{role} of block {r['block']}: {lead:+.1f} dB")
                for r in tensors
                if r["role"] == role
                for lead in [r["decibels"]["INT8, token"] - r["decibels"]["E4M3, token"]]
            ]
            series.append(Series(role, f"c{i}", points))
        return framed(series, "decoder block", "dB", f"Decibels that INT8 is ahead of E4M3 in inputs, {variant}")

    return draw


def framed(series: Sequence[Series], x_title: str, y_title: str, label: str) -> str:
    """A picture that stands alone: style sheet and legend come with it."""
    inner = plots.lines(series, x_title, y_title, label)
    legend, at = [], plots.LEFT
    for each in series:
        legend.append(plots.tag("rect", x=at, y=8, width=11, height=11, class_=each.style))
        legend.append(plots.tag("text", each.name, x=at + 16, y=18))
        at += 40 + 7.5 * len(each.name)
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', inner)
    assert size is not None
    width, height = int(size[1]), int(size[2])
    content = inner.replace("<svg ", f'<svg y="{LEGEND}" width="{width}" height="{height}" ', 1)
    box = f"0 0 {width} {height + LEGEND}"
    style = plots.tag("style", STYLE)
    return plots.tag("svg", style + "".join(legend) + content, viewBox=box, xmlns="http://www.w3.org/2000/svg")


PLOTS: dict[str, Callable[[Found], str]] = {
    "crests": leads,
    **{f"inputs-{variant}": over_depth(variant) for variant in VARIANTS},
}
"""Every plot of the page: docs/study-NAME.svg."""
