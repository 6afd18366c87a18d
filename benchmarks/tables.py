"""Small studies of rewrites, as tables of docs/rewrites.md: recipes side by side on variants of the demo model.

A cell is a recipe that ships with something set in it; its divergence is kept in `benchmarks/tables.json` by what was
run, so a study that was cut off goes on, and cells that tables share are run once. What is not in that file is an empty
cell of the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.system import Measured, Variant, Way

KEPT = Path(__file__).with_name("tables.json")


class Cell(NamedTuple):
    """One model to measure."""

    way: Way
    variant: Variant = "off-grid"

    @property
    def key(self) -> str:
        """Where its divergence is kept."""
        return " ".join((self.variant, self.way.recipe, *self.way.set))


class Table(NamedTuple):
    """A table of divergences.

    Attributes:
        corner: what its lines are.
        columns: what its columns are.
        lines: cells by label, as many as columns.
    """

    corner: str
    columns: tuple[str, ...]
    lines: Mapping[str, tuple[Cell, ...]]


def cell(recipe: str, *overrides: str, variant: Variant = "off-grid") -> Cell:
    """A recipe that ships, with what is set in it."""
    return Cell(Way(recipe=recipe, set=overrides), variant)


def both(recipe: str, *overrides: str) -> tuple[Cell, Cell]:
    """The model as it is, and with outliers in its activations."""
    return cell(recipe, *overrides), cell(recipe, *overrides, variant="outliers")


def rotations() -> Table:
    """W4A4 by format, rounded to nearest, behind rotations of several kinds.

    https://arxiv.org/abs/2511.04214, https://arxiv.org/abs/2509.23202, https://arxiv.org/abs/2510.25602
    """
    ways = {
        "nothing": "[]",
        "hidden states and values turned": "[rotate]",
        "Hadamard matrices of 16": "[{hadamard: {block: 16}}]",
        "Hadamard matrices of 32": "[{hadamard: {block: 32}}]",
        "Hadamard matrices of 64": "[{hadamard: {block: 64}}]",
    }
    formats = {"MXFP4": "mxfp4", "NVFP4": "nvfp4", "NVINT4": "nvint4", "INT4, 32": "int4-g32"}

    def rounded(fmt: str, transforms: str) -> Cell:
        rule = f"layers=[{{match: lm_head, keep: true}}, {{match: '*', weights: {fmt}, activations: {fmt}}}]"
        return cell("mxfp4-hadamard", f"transforms={transforms}", rule, "method=rtn", "export=[{to: qtool}]")

    lines = {label: tuple(rounded(fmt, way) for fmt in formats.values()) for label, way in ways.items()}
    return Table("rewrite", tuple(formats), lines)


def strengths() -> Table:
    """Smoothing by strength: https://arxiv.org/abs/2211.10438, https://arxiv.org/abs/2312.03788."""

    def smoothed(alpha: str) -> tuple[Cell, ...]:
        way = "transforms=[]" if alpha == "none" else f"transforms=[{{smooth: {{alpha: {alpha}}}}}]"
        return (*both("w8a8-int8-smooth", way), cell("w4a16-awq", way))

    columns = ("W8A8, INT8", "W8A8, INT8, with outliers", "W4A16, groups of 64")
    return Table("alpha", columns, {alpha: smoothed(alpha) for alpha in ("none", "0.25", "0.5", "0.75", "1")})


def calibrations() -> Table:
    """Calibration by amount and by what is read: https://arxiv.org/abs/2405.20835."""
    sources = {"prose of Python's library": "builtin", "sampled from the model": "self"}

    def on(data: str, samples: int) -> Cell:
        return cell("w4a16-awq", f"calibration.data={data}", f"calibration.samples={samples}")

    lines = {label: tuple(on(data, samples) for samples in (2, 8, 32)) for label, data in sources.items()}
    return Table("AWQ, W4A16, on", ("2 x 512 tokens", "8 x 512", "32 x 512"), lines)


def low_bits() -> Table:
    """Methods at 2, 3 and 4 bits, groups of 64: https://arxiv.org/abs/2404.14047."""
    methods = {
        "RTN": ("method=rtn",),
        "RTN behind smoothing": ("method=rtn", "transforms=[smooth]"),
        "RTN behind AWQ": ("method=rtn", "transforms=[awq]"),
        "GPTQ": ("method=gptq",),
        "GPTQ behind a rotation": ("method=gptq", "transforms=[rotate]"),
    }

    def at(bits: int, settings: Sequence[str]) -> Cell:
        rule = f"layers=[{{match: lm_head, keep: true}}, {{match: '*', weights: int{bits}-g64}}]"
        return cell("w4a16-gptq-g64", rule, *settings, "export=[{to: qtool}]")

    lines = {label: tuple(at(bits, settings) for bits in (2, 3, 4)) for label, settings in methods.items()}
    return Table("method", ("2 bits", "3 bits", "4 bits"), lines)


def eight_bits() -> Table:
    """FP8 and INT8 for weights and inputs, against 4-bit weights: https://arxiv.org/abs/2411.02355."""
    lines = {
        "FP8, inputs by token": both("fp8-dynamic"),
        "INT8, inputs by token": both("w8a8-int8"),
        "INT8, inputs by token, smoothed": both("w8a8-int8-smooth"),
        "INT8, weights alone": both("w8a16"),
        "INT4, weights alone, RTN, groups of 64": both("w4a16-rtn-g64"),
        "INT4, weights alone, AWQ, groups of 64": both("w4a16-awq"),
    }
    return Table("recipe", ("off any grid", "with outliers"), lines)


TABLES: dict[str, Callable[[], Table]] = {
    "rotations": rotations,
    "strengths": strengths,
    "calibrations": calibrations,
    "low-bits": low_bits,
    "eight-bits": eight_bits,
}


def kept() -> dict[str, float]:
    """Divergences that were measured, nats per token."""
    found: dict[str, float] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return found


def measure(run: Callable[[Way, Variant], Measured], names: Sequence[str] = ()) -> Iterator[tuple[str, float]]:
    """Measures the cells that are not known yet, and keeps each.

    Args:
        run: measures a recipe on a model.
        names: of tables; empty: all.

    Yields:
        What was run, and its divergence.
    """
    for name in names or TABLES:
        for line in TABLES[name]().lines.values():
            for one in line:
                if one.key not in (known := kept()):
                    known[one.key] = float(f"{run(one.way, one.variant).kld:.4g}")
                    KEPT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                    yield one.key, known[one.key]


def rows(name: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table as the page shows it; the least of a column is bold."""
    table, known = TABLES[name](), kept()
    values = [[known.get(one.key) for one in line] for line in table.lines.values()]
    least = [min((v for v in column if v is not None), default=None) for column in zip(*values, strict=True)]

    def shown(value: float | None, best: float | None) -> str:
        if value is None:
            return ""
        return f"**{value:.3g}**" if value == best else f"{value:.3g}"

    found = [
        (label, *(shown(value, best) for value, best in zip(line, least, strict=True)))
        for label, line in zip(table.lines, values, strict=True)
    ]
    return (table.corner, *table.columns), found
