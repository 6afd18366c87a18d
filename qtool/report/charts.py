"""Which plots a report's page shows, and what is in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from qtool.report import plots
from qtool.report.model import CourseEntry, LayerEntry, Report
from qtool.report.plots import Point, Series
from qtool.report.summary import (
    best_step,
    decibels,
    errors,
    measures_output,
    model_bytes,
    number,
    roles,
    stored_as,
    weights,
)
from qtool.report.units import size

COLORS, SHADES = 9, 5
"""How many styles `c0` ... and `b0` ... the page's sheet has."""
EXCEPTIONS = 0.1
"""Share of layers up to which fallbacks are exceptions, which plots mark."""
LEVER = 0.25
"""Share of the size from which a role that is kept as it is is worth a remark."""
QUANTILES = {
    "median": "kld_median",
    "90 %": "kld_p90",
    "95 %": "kld_p95",
    "99 %": "kld_p99",
    "99.9 %": "kld_p999",
    "largest": "kld_max",
}
"""Places of the percentile plot, and fields of an evaluation."""


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
    found = (shares(report), percentiles(report), depth(report), distribution(report), bits(report))
    return [chart for chart in found if chart]


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
    everything = [db for blocks in worst.values() for db, _ in blocks.values()]
    low, high = plots.usual(everything)
    fallbacks = [layer for blocks in worst.values() for _, layer in blocks.values() if layer.fallback]
    rare = len(fallbacks) <= EXCEPTIONS * len(everything)
    series = []
    for role, style in styles(report).items():
        found = [(block, *worst[role][block]) for block in sorted(worst.get(role, {}))]
        points = [
            Point(
                block,
                min(max(db, low), high),
                describe(layer, db),
                not low <= db <= high or (rare and layer.fallback is not None),
            )
            for block, db, layer in found
        ]
        if points:
            series.append(Series(role, style, points))
    note = f"Signal-to-error ratio of {kind(report)}; higher is better, and 6 dB more is half the error."
    if fallbacks and rare:
        note += " Rings mark fallbacks."
    if beyond := sum(not low <= db <= high for db in everything):
        note += f" Rings at the edge mark {beyond} layers beyond the scale, which shows what most are like."
    svg = plots.lines(series, "decoder block", "dB", "Error of each layer over depth, by role", (low, high))
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
        takes = f"{weights(layer):,} weights in {layer.nbytes:,} bytes"
        cells[layer.role][int(layer.block or 0)] = (style, f"{layer.name}: {label}; {takes}")
    rows = {role: row for role, row in cells.items() if row}
    svg = plots.grid(rows, max(map(max, rows.values())) + 1, "decoder block", "Bits per weight of each layer")
    note = "How every layer of the decoder blocks is stored, scales included; the stronger the colour, the more bits."
    return Chart("Bits per layer", note, [(style, label) for (_, label), style in sorted(labels.items())], Markup(svg))


def shade(values: Iterable[float]) -> dict[float, str]:
    """Distinct numbers -> shades from light to dark, by ratio: a fourth of the largest is the lightest."""
    distinct = sorted(set(values))
    if not distinct:
        return {}
    last = SHADES - 1
    widest = max(math.log(distinct[-1] / distinct[0]), math.log(4))
    return {v: f"b{last - round(math.log(distinct[-1] / v) / widest * last)}" for v in distinct}


def shares(report: Report) -> Chart | None:
    """What each role takes of the model's size."""
    total = model_bytes(report)
    found = {role: sum(e.nbytes for e in report.layers if e.role == role) for role in roles(report)}
    found = dict(sorted(found.items(), key=lambda pair: -pair[1]))
    if not total or not any(found.values()):
        return None
    colours = styles(report)
    parts = [
        Series(role, colours[role], [(nbytes / total, f"{role}: {size(nbytes)}, {nbytes / total:.1%}")])
        for role, nbytes in found.items()
        if nbytes
    ]
    kept = {role for role in found if all(e.format is None for e in report.layers if e.role == role)}
    levers = [f"{role} ({found[role] / total:.0%})" for role in found if role in kept and found[role] >= LEVER * total]
    note = "What the matrices of each role take of the whole."
    if levers:
        note += f" Not quantized, and the largest lever on size: {', '.join(levers)}."
    return Chart("Size by role", note, legend(parts), Markup(plots.strip(parts, "Share of each role in the size")))


def percentiles(report: Report) -> Chart | None:
    """How divergence is distributed over positions of a text: a line per evaluation."""
    series = []
    for i, e in enumerate(e for e in report.evaluations if e.kld_mean is not None):
        found = [(at, name, getattr(e, field)) for at, (name, field) in enumerate(QUANTILES.items())]
        points = [Point(at, value, f"{name}: {value:.3g} nats") for at, name, value in found if value and value > 0]
        if points:
            series.append(Series(f"{e.text}, run by {e.runtime}", f"c{i % COLORS}", points))
    if not series:
        return None
    note = "KL divergence that so many positions of the text stay below, nats, on a logarithmic scale."
    svg = plots.rising(series, list(QUANTILES), "positions", "Percentiles of KL divergence")
    return Chart("Divergence over positions", note, legend(series), Markup(svg))


TRAINING = [("c0", "training"), ("c2", "held out")]
"""Legend of the plots of trainings."""


def training(course: Sequence[CourseEntry]) -> Markup:
    """Both losses over the steps of a training; a ring marks the state that was kept."""
    kept = best_step(course)
    (seen, learned), (unseen, held_out) = TRAINING
    first = [Point(e.step, e.training, says(e)) for e in course if e.training is not None and math.isfinite(e.training)]
    second = [Point(e.step, e.held_out, says(e), e.step == kept) for e in course if math.isfinite(e.held_out)]
    shown = [s for s in (Series(learned, seen, first), Series(held_out, unseen, second)) if s.values]
    return Markup(plots.small(shown, "Losses over the steps of a training")) if shown else Markup()


def says(at: CourseEntry) -> str:
    """What a mark of a training says when pointed at."""
    learned = "" if at.training is None else f"training {number(at.training)}, "
    return f"{at.step}: {learned}held out {number(at.held_out)}"
