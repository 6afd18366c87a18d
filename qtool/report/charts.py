"""Which plots a report's page shows, and what is in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

from qtool.report import plots
from qtool.report.model import LayerEntry, Report
from qtool.report.plots import Point, Series
from qtool.report.summary import decibels, errors, measures_output, roles, stored_as, weights

COLORS, SHADES = 9, 5
"""How many styles `c0` ... and `b0` ... the page's sheet has."""


class Chart(NamedTuple):
    """A picture with its words.

    Attributes:
        title, note: above it.
        legend: (style, label) of each series.
        svg: markup, safe to embed.
    """

    title: str
    note: str
    legend: list[tuple[str, str]]
    svg: Markup


def charts(report: Report) -> list[Chart]:
    """Those that the report has data for."""
    return [chart for chart in (depth(report), distribution(report), bits(report)) if chart]


def styles(report: Report) -> dict[str, str]:
    """A colour for each role, the same in every plot."""
    return {role: f"c{i % COLORS}" for i, role in enumerate(roles(report))}


def kind(report: Report) -> str:
    """What the error plots are about."""
    return "layer outputs on the calibration tokens" if measures_output(report) else "weights"


def legend(series: Iterable[Series]) -> list[tuple[str, str]]:
    """One entry per series."""
    return [(each.style, each.name) for each in series]


def describe(layer: LayerEntry, db: float) -> str:
    """What a mark says when pointed at."""
    fallback = f"; fallback: {layer.fallback}" if layer.fallback else ""
    return f"{layer.name}: {decibels(db)} dB, {stored_as(layer)}{fallback}"


def depth(report: Report) -> Chart | None:
    """Error of each layer over block index, a line per role; where a role has several layers (experts), the worst."""
    worst: dict[str, dict[int, tuple[float, LayerEntry]]] = {}
    for layer, db in errors(report):
        if layer.block is not None and math.isfinite(db):
            blocks = worst.setdefault(layer.role, {})
            if layer.block not in blocks or db < blocks[layer.block][0]:
                blocks[layer.block] = (db, layer)
    if not worst:
        return None
    series = []
    for role, style in styles(report).items():
        found = [(block, *worst[role][block]) for block in sorted(worst.get(role, {}))]
        points = [Point(block, db, describe(layer, db), layer.fallback is not None) for block, db, layer in found]
        if points:
            series.append(Series(role, style, points))
    note = f"Signal-to-error ratio of {kind(report)}; higher is better, and 6 dB more is half the error."
    if any(point.marked for each in series for point in each.values):
        note += " Rings mark fallbacks."
    svg = plots.lines(series, "decoder block", "dB", "Error of each layer over depth, by role")
    return Chart("Error over depth", note, legend(series), Markup(svg))


def distribution(report: Report) -> Chart | None:
    """How many layers have which error."""
    found = [(layer.role, db) for layer, db in errors(report) if math.isfinite(db)]
    if not found:
        return None
    series = [
        Series(role, style, values)
        for role, style in styles(report).items()
        if (values := [db for r, db in found if r == role])
    ]
    note = f"The same ratios, counted over all {len(found)} quantized layers."
    svg = plots.histogram(series, "dB", "layers", "Distribution of layer errors")
    return Chart("Distribution of errors", note, legend(series), Markup(svg))


def bits(report: Report) -> Chart | None:
    """Bits per weight of every layer of the decoder blocks: a map of roles over depth."""
    inside = [layer for layer in report.layers if layer.block is not None]
    if not inside:
        return None
    shades = shade(layer.bits_per_weight for layer in inside if layer.format)
    labels: dict[tuple[float, str], str] = {}
    cells: dict[str, dict[int, tuple[str, str]]] = {role: {} for role in roles(report)}
    for layer in inside:
        style = shades[layer.bits_per_weight] if layer.format else "kept"
        label = f"{stored_as(layer)}, {layer.bits_per_weight:.4g} bits"
        labels[layer.bits_per_weight, label] = style
        size = f"{weights(layer):,} weights in {layer.nbytes:,} bytes"
        cells[layer.role][int(layer.block or 0)] = (style, f"{layer.name}: {label}; {size}")
    rows = {role: row for role, row in cells.items() if row}
    svg = plots.grid(rows, max(map(max, rows.values())) + 1, "decoder block", "Bits per weight of each layer")
    note = "How every layer of the decoder blocks is stored, scales included; the stronger the colour, the more bits."
    return Chart("Bits per layer", note, [(style, label) for (_, label), style in sorted(labels.items())], Markup(svg))


def shade(values: Iterable[float]) -> dict[float, str]:
    """Distinct numbers -> shades from light to dark."""
    distinct = sorted(set(values))
    last = max(len(distinct) - 1, 1)
    return {v: f"b{round(i * (SHADES - 1) / last) if len(distinct) > 1 else 2}" for i, v in enumerate(distinct)}
