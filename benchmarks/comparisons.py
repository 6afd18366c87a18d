"""What the study compares: formats, methods, and the tables of docs/study.md that show divergences.

Formats of a pair choose scales by one rule, that of https://arxiv.org/abs/2510.25602: the least that cover everything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.tensors import Pair
from qtool.formats._base import Format
from qtool.formats._spelling import parse_format

VARIANTS = {"plain": 1.0, "outliers": 40.0}
"""Name -> how much larger some channels of activations are."""


def shared_exponent(element: str) -> dict[str, Any]:
    """A microscaling format whose powers of two cover every weight, and at run time every input."""
    if element.startswith("int"):
        return {"type": "bfp", "bits": int(element[3]), "group": 32, "search": "up"}
    return {"type": "fp", "element": element, "group": 32, "scales": "minmax", "constraint": "power"}


def one_scale(element: str, group: str) -> str:
    """Eight bits with one scale per tensor, channel or token; that of weights and tensors has the least error."""
    return f"int8-{group}" if element == "INT8" else f"fp8-{element.lower()}-{group}"


EIGHT_BITS = ("INT8", "E2M5", "E3M4", "E4M3", "E5M2")
GROUPS = ("tensor", "channel", "token")
MICRO = {"MXINT8": "int8", "MXFP8": "e4m3", "MXINT6": "int6", "MXFP6": "e2m3", "MXINT4": "int4", "MXFP4": "e2m1"}
FORMATS: dict[str, Any] = {
    **{name: shared_exponent(element) for name, element in MICRO.items()},
    "NVINT4": "nvint4-minmax",
    "NVFP4": "nvfp4-minmax",
    **{f"{element}, {group}": one_scale(element, group) for element in EIGHT_BITS for group in GROUPS},
    "E2M1, power of two, 16": shared_exponent("e2m1") | {"group": 16},
    "E2M1, BF16, 32": {"type": "fp", "element": "e2m1", "group": 32, "scales": "minmax"},
    "E2M1, BF16, 16": {"type": "fp", "element": "e2m1", "group": 16, "scales": "minmax"},
    "MXFP4, floor": "mxfp4-floor",
    "MXFP4, even": "mxfp4-even",
    "MXFP4, searched": "mxfp4",
    "NVFP4, searched": "nvfp4",
    "INT4, searched": "int4-g32",
}
"""Name in this study -> format as in recipes."""

FROZEN = {"gptq": {"fit": "before", "rounds": 0, "drift": 0.0, "damp": 0.01}}
METHODS: dict[str, Any] = {"RTN": "rtn", "GPTQ, frozen scales": FROZEN, "GPTQ": "gptq"}
"""Name in this study -> method as in recipes."""

PAIRS = (
    Pair("MXINT8", "MXFP8", 32),
    Pair("MXINT6", "MXFP6", 32),
    Pair("MXINT4", "MXFP4", 32),
    Pair("NVINT4", "NVFP4", 16),
)


class Run(NamedTuple):
    """One model to measure: names of formats and of a method."""

    weights: str
    inputs: str = ""
    method: str = "RTN"

    def key(self, variant: str) -> str:
        """Where its divergence is kept."""
        return " | ".join((variant, self.method, self.weights, self.inputs))


class Row(NamedTuple):
    """A line of a table of divergences.

    Attributes:
        labels: what its first cells say.
        runs: one per heading, each measured on all variants.
        rival: lines of a table with the same number are compared.
    """

    labels: tuple[str, ...]
    runs: tuple[Run, ...]
    rival: int = 0


class Table(NamedTuple):
    """A table of divergences: headings of the labels, of the runs, and lines."""

    labels: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[Row, ...]


def both(weights: str, inputs: str = "", method: str = "RTN") -> tuple[Run, Run]:
    """Weights only, and inputs as well: in the same format if nothing is said."""
    return Run(weights, "", method), Run(weights, inputs or weights, method)


def eight_bits(element: str) -> tuple[Run, ...]:
    """With one scale per tensor or row."""
    weights = f"{element}, channel"
    inputs = (Run(weights, f"{element}, token"), Run(weights, f"{element}, tensor"))
    return Run(f"{element}, tensor"), Run(weights), *inputs


def methods(name: str, weights: str, inputs: str, rival: int) -> tuple[Row, ...]:
    """A format by every method."""
    return tuple(Row((name, method), both(weights, inputs, method), rival) for method in METHODS)


WEIGHTS_INPUTS = ("weights", "weights and inputs")
TABLES = {
    "blocks": Table(
        ("format",),
        WEIGHTS_INPUTS,
        tuple(Row((name,), both(name), i) for i, pair in enumerate(PAIRS) for name in pair[:2]),
    ),
    "eight-bits": Table(
        ("elements",),
        ("weights per tensor", "weights per channel", "and inputs per token", "and inputs per tensor"),
        tuple(Row((element,), eight_bits(element)) for element in EIGHT_BITS),
    ),
    "scales": Table(
        ("block", "scale"),
        WEIGHTS_INPUTS,
        (
            Row(("32", "power of two (MXFP4)"), both("MXFP4")),
            Row(("32", "BF16"), both("E2M1, BF16, 32")),
            Row(("16", "power of two"), both("E2M1, power of two, 16")),
            Row(("16", "E4M3 and one for the matrix (NVFP4)"), both("NVFP4")),
            Row(("16", "BF16"), both("E2M1, BF16, 16")),
        ),
    ),
    "rules": Table(
        ("format", "scales"),
        WEIGHTS_INPUTS,
        (
            Row(("MXFP4", "floor (OCP)"), both("MXFP4, floor")),
            Row(("MXFP4", "up: nothing is clipped"), both("MXFP4", "MXFP4, floor")),
            Row(("MXFP4", "even: up from 1.75"), both("MXFP4, even")),
            Row(("MXFP4", "least error"), both("MXFP4, searched")),
            Row(("NVFP4", "largest weight"), both("NVFP4"), 1),
            Row(("NVFP4", "least error"), both("NVFP4, searched"), 1),
        ),
    ),
    "methods": Table(
        ("format", "method"),
        WEIGHTS_INPUTS,
        (
            *methods("MXFP4", "MXFP4, searched", "MXFP4, searched", 0),
            *methods("NVFP4", "NVFP4, searched", "NVFP4, searched", 1),
            *methods("INT4, 32 share a BF16 scale", "INT4, searched", "INT4, searched", 2),
        ),
    ),
}


def runs() -> list[Run]:
    """All of them once, those side by side that share their weights; what takes longest comes last."""
    found = dict.fromkeys(run for table in TABLES.values() for row in table.rows for run in row.runs)
    return sorted(found, key=lambda run: (list(METHODS).index(run.method), run.weights))


def tensor_formats() -> dict[str, dict[str, Format]]:
    """What single tensors are rounded in, by kind and name."""
    paired = {name for pair in PAIRS for name in pair[:2]}
    rows = {"weight": "channel", "input": "token"}
    return {
        kind: {name: parse_format(f) for name, f in FORMATS.items() if name in paired or name.endswith((row, "tensor"))}
        for kind, row in rows.items()
    }
