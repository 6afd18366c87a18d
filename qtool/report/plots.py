"""Plots as inline SVG: no library, no script, colours from the page's style sheet.

Every mark has a hover title. The same input gives the same characters. Coordinates are in user units of a fixed view
box that the page scales; the margins leave room for the larger type that narrow screens get.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

LEFT, RIGHT, TOP, BOTTOM = 66.0, 12.0, 12.0, 50.0
"""Margins around the plotting area: tick labels and axis titles stand in them."""
ROOM = 3.0
"""Around a small plot."""


class Series(NamedTuple):
    """What belongs together: points of a line, or numbers to count. `style` is a class of the page's sheet."""

    name: str
    style: str
    values: Sequence[Any]


class Point(NamedTuple):
    """A measured value; `marked` draws it as an open ring."""

    x: float
    y: float
    title: str
    marked: bool = False


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An SVG element; `content` is markup, attributes are text. `class_` stands for class, `_` for `-`."""
    spelled = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    text = "".join(f' {k}="{escape(trim(v))}"' for k, v in spelled.items())
    return f"<{name}{text}>{content}</{name}>" if content else f"<{name}{text}/>"


def trim(value: object) -> str:
    """Two decimals at most, and no needless ones."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def hover(text: str) -> str:
    """The title that browsers show over a mark."""
    return tag("title", escape(text))


def step(low: float, high: float, count: int) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that divides [low, high] into at most `count` parts."""
    raw = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of a round step within [low, high], about `count` of them."""
    width = step(low, high, count)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [i * width for i in range(first, last + 1)]


def whole(values: Iterable[float]) -> list[float]:
    """Those that are integers."""
    return [v for v in values if v == round(v)]


class Axes:
    """A plotting area with scales: x in [x0, x1] and y in [y0, y1] map into the view box."""

    def __init__(self, size: tuple[float, float], x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width, self.height = size
        self.x0, self.x1 = x
        self.y0, self.y1 = y

    def px(self, x: float) -> float:
        """View box coordinate of a value."""
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def py(self, y: float) -> float:
        """View box coordinate of a value."""
        return self.height - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (self.height - TOP - BOTTOM)

    def frame(self, x_title: str, y_title: str, x_ticks: Iterable[float], y_ticks: Iterable[float]) -> str:
        """Grid lines, tick labels and axis titles."""
        parts = []
        for y in y_ticks:
            at = self.py(y)
            parts.append(tag("line", class_="grid", x1=LEFT, x2=self.width - RIGHT, y1=at, y2=at))
            parts.append(tag("text", f"{y:g}", x=LEFT - 6, y=at, dy="0.35em", text_anchor="end"))
        base = self.height - BOTTOM
        parts.append(tag("line", class_="axis", x1=LEFT, x2=self.width - RIGHT, y1=base, y2=base))
        middle = (TOP + base) / 2
        place = {"x": 12.0, "y": middle, "transform": f"rotate(-90 12 {trim(middle)})", "text_anchor": "middle"}
        parts.append(tag("text", escape(y_title), class_="turned", **place))
        return "".join(parts) + self.below(x_title, {x: x for x in x_ticks})

    def below(self, title: str, labels: Mapping[float, float | str]) -> str:
        """Tick labels by position, and the axis title, under the plotting area."""
        y = self.height - BOTTOM + 4
        parts = [
            tag(
                "text",
                shown if isinstance(shown, str) else f"{shown:g}",
                x=self.px(x),
                y=y,
                dy="0.9em",
                text_anchor="middle",
            )
            for x, shown in labels.items()
        ]
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(tag("text", escape(title), x=middle, y=self.height - 3, text_anchor="middle"))
        return "".join(parts)

    def svg(self, label: str, content: str) -> str:
        """The finished picture; `label` is what screen readers say."""
        box = f"0 0 {trim(self.width)} {trim(self.height)}"
        return tag("svg", content, viewBox=box, role="img", aria_label=label, xmlns="http://www.w3.org/2000/svg")


class Bare(Axes):
    """The same with nothing beside the plotting area but room for marks at its edge."""

    def px(self, x: float) -> float:
        """See `Axes.px`."""
        return ROOM + (x - self.x0) / (self.x1 - self.x0) * (self.width - 2 * ROOM)

    def py(self, y: float) -> float:
        """See `Axes.py`."""
        return self.height - ROOM - (y - self.y0) / (self.y1 - self.y0) * (self.height - 2 * ROOM)


def span(values: Iterable[float], pad: float = 0.06) -> tuple[float, float]:
    """The range of values, a little wider."""
    values = list(values)
    low, high = min(values), max(values)
    room = (high - low) * pad or max(abs(high) * pad, 0.5)
    return low - room, high + room


def decades(axes: Axes) -> str:
    """Grid lines and numbers of a vertical axis of logarithms to base ten: four powers or more, or closer ones."""
    powers = [10.0**power for power in range(math.floor(axes.y0), math.ceil(axes.y1) + 1)]
    for digits, enough in (((1,), 4), ((1, 2, 5), 3), (range(1, 10), 3), ([fifth / 5 for fifth in range(5, 50)], 0)):
        values = [digit * power for power in powers for digit in digits]
        shown = [value for value in values if axes.y0 <= math.log10(value) <= axes.y1]
        if len(shown) >= enough:
            break
    found = []
    for value in shown:
        at = axes.py(math.log10(value))
        found.append(tag("line", class_="grid", x1=LEFT, x2=axes.width - RIGHT, y1=at, y2=at))
        found.append(tag("text", f"{value:g}", x=LEFT - 6, y=at, dy="0.35em", text_anchor="end"))
    return "".join(found)


def rising(series: Sequence[Series], labels: Sequence[str], x_title: str, label: str) -> str:
    """Lines over named places on a logarithmic scale; values are `Point`s of positive y."""
    logs = [math.log10(p.y) for each in series for p in each.values]
    axes = Axes((760.0, 300.0), (-0.3, len(labels) - 0.7), (min(logs) - 0.1, max(logs) + 0.1))
    drawn = [decades(axes), axes.below(x_title, dict(enumerate(labels)))]
    for each in series:
        at = [(axes.px(p.x), axes.py(math.log10(p.y)), p.title) for p in each.values]
        path = " ".join(f"{trim(x)},{trim(y)}" for x, y, _ in at)
        marks = "".join(tag("circle", hover(title), cx=x, cy=y, r=3.2) for x, y, title in at)
        drawn.append(tag("g", tag("polyline", points=path) + marks, class_=f"series {each.style}"))
    return axes.svg(label, "".join(drawn))


def strip(parts: Sequence[Series], label: str) -> str:
    """One bar of 100 %, cut into parts; the value of each is (share, hover title)."""
    axes = Axes((760.0, 92.0), (0.0, 1.0), (0.0, 1.0))
    drawn, left = [], 0.0
    for part in parts:
        ((share, title),) = part.values
        middle = axes.px(left + share / 2)
        drawn.append(tag("g", box(axes, (left, left + share), (0.0, 1.0), title), class_=part.style))
        if share > 0.07:
            drawn.append(tag("text", escape(part.name), x=middle, y=axes.height - BOTTOM + 18, text_anchor="middle"))
            drawn.append(tag("text", f"{share:.0%}", x=middle, y=axes.height - 12, text_anchor="middle"))
        left += share
    return axes.svg(label, "".join(drawn))


def usual(values: Sequence[float]) -> tuple[float, float]:
    """The range of values without those that lie far from most: beyond three times the middle half's width from it."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    room = 3 * max(high - low, 1.0)
    inside = [v for v in ordered if low - room <= v <= high + room]
    return inside[0], inside[-1]


def lines(
    series: Sequence[Series], x_title: str, y_title: str, label: str, y: tuple[float, float] | None = None
) -> str:
    """Lines over whole-numbered x; values are `Point`s. `y` is what the scale shows; None: all of them."""
    points = [p for each in series for p in each.values]
    x_high = max(p.x for p in points)
    axes = Axes((760.0, 330.0), (-0.5, x_high + 0.5), span(y or [p.y for p in points]))
    drawn = [axes.frame(x_title, y_title, whole(ticks(0, x_high, 8)), ticks(axes.y0, axes.y1))]
    return axes.svg(label, "".join([*drawn, *(joined(axes, each) for each in series)]))


def small(series: Sequence[Series], label: str) -> str:
    """The same without axes, to stand in a line of a table."""
    points = [p for each in series for p in each.values]
    axes = Bare((160.0, 44.0), span(p.x for p in points), span(p.y for p in points))
    return axes.svg(label, "".join(joined(axes, each) for each in series))


def joined(axes: Axes, series: Series) -> str:
    """Points at their places, and a line through them."""
    at = [(axes.px(p.x), axes.py(p.y), p) for p in series.values]
    path = " ".join(f"{trim(x)},{trim(y)}" for x, y, _ in at)
    marks = "".join(tag("circle", hover(p.title), cx=x, cy=y, r=2.6, **ring(p.marked)) for x, y, p in at)
    return tag("g", tag("polyline", points=path) + marks, class_=f"series {series.style}")


def ring(marked: bool) -> dict[str, str]:
    """Attributes of an open ring."""
    return {"class_": "ring"} if marked else {}


def histogram(series: Sequence[Series], x_title: str, y_title: str, label: str) -> str:
    """Stacked counts; values are numbers."""
    numbers = [v for each in series for v in each.values]
    low, high = span(numbers, 0.0)
    width = step(low, high, 30)
    first = math.floor(low / width)
    bins = math.floor(high / width) - first + 1
    totals = Counter(math.floor(v / width) for v in numbers)
    tallest = max(totals.values())
    axes = Axes((760.0, 240.0), (first * width, (first + bins) * width), (0.0, tallest * 1.05))
    drawn = [axes.frame(x_title, y_title, ticks(axes.x0, axes.x1, 8), whole(ticks(0, tallest, 4)))]
    below: Counter[int] = Counter()
    for each in series:
        marks = []
        for at, n in sorted(Counter(math.floor(v / width) for v in each.values).items()):
            left, right = at * width, (at + 1) * width
            title = f"{each.name}: {n} from {left:g} to {right:g} {x_title}"
            marks.append(box(axes, (left, right), (below[at], below[at] + n), title))
            below[at] += n
        drawn.append(tag("g", "".join(marks), class_=f"bars {each.style}"))
    return axes.svg(label, "".join(drawn))


def box(axes: Axes, x: tuple[float, float], y: tuple[float, float], title: str, **attributes: object) -> str:
    """A rectangle in data coordinates, with a hair's breadth of room to its neighbours."""
    left, right, bottom, top = axes.px(x[0]) + 0.7, axes.px(x[1]) - 0.7, axes.py(y[0]), axes.py(y[1])
    return tag("rect", hover(title), x=left, y=top, width=max(right - left, 0.5), height=bottom - top, **attributes)


def grid(rows: Mapping[str, Mapping[int, tuple[str, str]]], columns: int, x_title: str, label: str) -> str:
    """A map: one line per row, one cell per column; a cell is (class, hover title)."""
    height = 27.0 * len(rows) + TOP + BOTTOM
    axes = Axes((760, height), (0.0, float(columns)), (0.0, float(len(rows))))
    drawn = []
    for r, (name, cells) in enumerate(rows.items()):
        y = len(rows) - r
        drawn.append(tag("text", escape(name), x=LEFT - 6, y=axes.py(y - 0.5), dy="0.35em", text_anchor="end"))
        for column, (style, title) in cells.items():
            drawn.append(box(axes, (column, column + 1), (y - 0.96, y - 0.04), title, class_=style))
    drawn.append(axes.below(x_title, {x + 0.5: x for x in whole(ticks(0, columns - 1, 8))}))
    return axes.svg(label, "".join(drawn))
