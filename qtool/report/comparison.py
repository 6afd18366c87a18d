"""Several quantized models side by side: size against divergence, the ones that no other beats, one page.

Shape letters: none; sizes are bytes of tensors as stored, without file headers, so that layouts compare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup
from pydantic import Field

from qtool.evaluate.result import Evaluation
from qtool.report import meaning, summary
from qtool.report.charts import COLORS
from qtool.report.model import Entry
from qtool.report.plots import Axes, decades, hover, tag, ticks
from qtool.report.render import environment_for

NORMAL = 1.96
"""Standard errors on each side of a mean that 95 % of a normal distribution lie within."""
LEAST = 1e-6
"""Nats per token below which float32 does not tell models apart."""


class Compared(Entry):
    """One model.

    Attributes:
        name: unique, short.
        source: what the user called it.
        kind: of its layout, or the recipe's name.
        nbytes: of its tensors.
        bits_per_weight: of the whole model.
        evaluation: against the baseline; None if nothing is known.
        errors: median signal-to-error ratio of layers by role, dB; empty without a report.
        layers: the format of each layer, and its ratio in dB if a report has one that is finite.
        speed: tokens per second in llama.cpp: of a prompt, and of what is written; None if nobody asked it.
    """

    name: str
    source: str
    kind: str
    nbytes: int
    bits_per_weight: float
    evaluation: Evaluation | None
    errors: dict[str, float]
    layers: dict[str, tuple[str, float | None]] = Field(default_factory=dict)
    speed: tuple[float, float] | None = None


class Comparison(Entry):
    """Models, smallest first.

    Attributes:
        entries: all of them.
        text: what comparable divergences were measured on.
        comparable: names of those that were measured on that text, in the same chunks.
        best: names of those that no other model beats in both size and divergence.
    """

    entries: tuple[Compared, ...]
    text: str
    comparable: tuple[str, ...]
    best: tuple[str, ...]


def compare(entries: Sequence[Compared]) -> Comparison:
    """Sorts models, and finds those that compare and those that are best."""
    entries = sorted(entries, key=lambda e: (e.nbytes, e.name))
    measured = [(e, e.evaluation) for e in entries if e.evaluation is not None and e.evaluation.kld_mean is not None]
    common = Counter(protocol(found) for _, found in measured).most_common(1)
    alike = [(e, found) for e, found in measured if common and protocol(found) == common[0][0]]
    points = [(e.name, e.nbytes, found.kld_mean or 0.0) for e, found in alike]
    best = [
        name
        for name, nbytes, kld in points
        if not any(b <= nbytes and k <= kld and (b, k) != (nbytes, kld) for _, b, k in points)
    ]
    text = alike[0][1].text if alike else ""
    return Comparison(entries=tuple(entries), text=text, comparable=tuple(e.name for e, _ in alike), best=tuple(best))


def protocol(found: Evaluation) -> tuple[str, int, int, str | None]:
    """What two evaluations must share to be compared."""
    return found.text_sha256 or found.text, found.context, found.chunks, found.baseline


def html(comparison: Comparison) -> str:
    """The page, whole in itself."""
    environment = environment_for(autoescape=True)
    roles = [role for role in summary.ROLES if any(role in e.errors for e in comparison.entries)]
    chart = Markup(scatter(comparison)) if comparison.comparable else None
    template = environment.get_template("compare.html.j2")
    return template.render(
        c=comparison,
        s=summary,
        m=meaning,
        least=LEAST,
        divergence=divergence,
        chart=chart,
        roles=roles,
        styles=styles(comparison),
        timed=any(e.speed for e in comparison.entries),
        reported=[e.name for e in comparison.entries if e.layers],
        layers=layer_rows(comparison),
    )


def layer_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """A row for each layer, a cell for each model; those first whose errors differ most, then whose formats do."""
    reported = [e.layers for e in comparison.entries if e.layers]
    names = list(dict.fromkeys(name for layers in reported for name in layers)) if len(reported) > 1 else []

    def difference(name: str) -> tuple[float, bool]:
        there = [layers[name] for layers in reported if name in layers]
        found = [db for _, db in there if db is not None]
        return min(found, default=0.0) - max(found, default=0.0), len({label for label, _ in there}) == 1

    def cell(layers: dict[str, tuple[str, float | None]], name: str) -> str:
        label, db = layers.get(name, ("-", None))
        return label if db is None else f"{label}, {summary.decibels(db)}"

    return [(name, [cell(layers, name) for layers in reported]) for name in sorted(names, key=difference)]


def styles(comparison: Comparison) -> dict[str, str]:
    """A colour for each model."""
    return {e.name: f"c{i % COLORS}" for i, e in enumerate(comparison.entries)}


def scatter(comparison: Comparison) -> str:
    """Size against mean divergence on a logarithmic scale, 95 % intervals, and the line of the best."""
    points = [(e, e.evaluation) for e in comparison.entries if e.name in comparison.comparable]
    spans = {e.name: interval(found) for e, found in points if found}
    low, high = min(s[0] for s in spans.values()), max(s[2] for s in spans.values())
    sizes = [e.nbytes / 1e6 for e, _ in points]
    room = max(max(sizes) - min(sizes), 0.05 * max(sizes)) * 0.08
    y = (math.log10(low) - 0.1, math.log10(high) + 0.1)
    axes = Axes((760.0, 380.0), (min(sizes) - room, max(sizes) + room), y)
    drawn = [axes.below("MB of tensors", {x: x for x in ticks(axes.x0, axes.x1, 6)}), decades(axes)]
    line = [(e.nbytes / 1e6, math.log10(spans[e.name][1])) for e, _ in points if e.name in comparison.best]
    path = " ".join(f"{axes.px(x):.2f},{axes.py(v):.2f}" for x, v in line)
    drawn.append(tag("polyline", points=path, class_="pareto"))
    for e, _ in points:
        at, (bottom, middle, top) = axes.px(e.nbytes / 1e6), (axes.py(math.log10(v)) for v in spans[e.name])
        title = hover(f"{e.name}: {e.nbytes / 1e6:.1f} MB, {middle_text(e)}")
        bar = tag("line", x1=at, x2=at, y1=top, y2=bottom)
        dot = tag("circle", title, cx=at, cy=middle, r=5 if e.name in comparison.best else 3.5)
        drawn.append(tag("g", bar + dot, class_=f"dots {styles(comparison)[e.name]}"))
    return axes.svg("Size against mean KL divergence", "".join(drawn))


def interval(found: Evaluation) -> tuple[float, float, float]:
    """(low, mean, high) of a divergence as the plot has it: none below what can be told apart."""
    mean, error = max(found.kld_mean or 0.0, LEAST), found.kld_error or 0.0
    error = error if math.isfinite(error) else 0.0
    return max(mean - NORMAL * error, mean / 10), mean, mean + NORMAL * error


def divergence(found: Evaluation) -> str:
    """A mean divergence, nats per token."""
    mean = found.kld_mean or 0.0
    return summary.number(mean) if mean >= LEAST else f"< {LEAST:g}"


def middle_text(entry: Compared) -> str:
    """A divergence with its standard error."""
    found = entry.evaluation
    return "" if found is None or found.kld_mean is None else f"{summary.number(found.kld_mean)} nats"
