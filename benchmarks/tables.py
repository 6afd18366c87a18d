"""Small studies of rewrites, as tables of docs/rewrites.md: recipes side by side on variants of the demo model.

A cell is a recipe that ships with something set in it, measured and kept by `benchmarks/cells.py`. What is not known is
an empty cell of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.cells import Cell, Measured, Variant, Way, known


class Column(NamedTuple):
    """A column of a table: what it is called, and which of the divergences it shows."""

    label: str
    shows: Callable[[Measured], float | None] = lambda found: found.kld


def on_code(found: Measured) -> float | None:
    """The divergence on source code."""
    return found.code


class Table(NamedTuple):
    """A table of divergences.

    Attributes:
        corner: what its lines are.
        columns: what its columns show.
        lines: cells by label, as many as columns.
    """

    corner: str
    columns: tuple[Column, ...]
    lines: Mapping[str, tuple[Cell, ...]]


def cell(recipe: str, *overrides: str, variant: Variant = "off-grid", code: bool = False) -> Cell:
    """A recipe that ships, with what is set in it."""
    return Cell(Way(recipe=recipe, set=overrides), variant, code)


def plain(*labels: str) -> tuple[Column, ...]:
    """Columns that show divergences on prose."""
    return tuple(map(Column, labels))


def rule(fmt: str, more: str = "") -> str:
    """Everything in a format but the head."""
    return f"layers=[{{match: lm_head, keep: true}}, {{match: '*', weights: {fmt}{more}}}]"


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
        "smoothing, then Hadamard matrices of 32": "[smooth, {hadamard: {block: 32}}]",
    }
    formats = {"MXFP4": "mxfp4", "NVFP4": "nvfp4", "NVINT4": "nvint4", "INT4, 32": "int4-g32"}

    def rounded(fmt: str, way: str, variant: Variant) -> Cell:
        settings = (f"transforms={way}", rule(fmt, f", activations: {fmt}"), "method=rtn", "export=[{to: qtool}]")
        return cell("mxfp4-hadamard", *settings, variant=variant)

    columns = plain(*formats, "MXFP4, with outliers", "NVFP4, with outliers")
    pairs: list[tuple[str, Variant]] = [(fmt, "off-grid") for fmt in formats.values()]
    pairs += [(fmt, "outliers") for fmt in ("mxfp4", "nvfp4")]
    lines = {label: tuple(rounded(fmt, way, variant) for fmt, variant in pairs) for label, way in ways.items()}
    return Table("rewrite", columns, lines)


def strengths() -> Table:
    """Smoothing by strength: https://arxiv.org/abs/2211.10438, https://arxiv.org/abs/2312.03788."""

    def smoothed(alpha: str) -> tuple[Cell, ...]:
        way = "transforms=[]" if alpha == "none" else f"transforms=[{{smooth: {{alpha: {alpha}}}}}]"
        eight = (cell("w8a8-int8-smooth", way, variant=variant) for variant in VARIANTS)
        return (*eight, cell("w4a16-awq", way))

    columns = plain("W8A8, INT8", "W8A8, INT8, with outliers", "W4A16, groups of 64")
    alphas = ("none", "0", "0.25", "0.5", "0.75", "1")
    return Table("alpha", columns, {alpha: smoothed(alpha) for alpha in alphas})


def calibrations() -> Table:
    """Calibration by amount and by what is read: https://arxiv.org/abs/2405.20835."""
    sources = {
        "topics of Python's help": "builtin",
        "docstrings, of which others are evaluated": "TEXTS/other-prose.txt",
        "source code": "TEXTS/other-code.txt",
        "words of docstrings without order": "TEXTS/words.txt",
        "sampled from the model": "self",
    }

    def on(data: str, samples: int) -> Cell:
        return cell("w4a16-awq", f"calibration.data={data}", f"calibration.samples={samples}")

    sizes = (2, 8, 32, 128)
    lines = {label: tuple(on(data, n) for n in sizes) for label, data in sources.items()}
    return Table("AWQ, W4A16, on", plain(*(f"{n} x 512 tokens" for n in sizes)), lines)


def low_bits() -> Table:
    """Methods at 2, 3 and 4 bits, groups of 64: https://arxiv.org/abs/2404.14047."""
    few = "scales: true, steps: 70, batch: 4"
    methods = {
        "RTN": ("int{}-g64", "method=rtn"),
        "RTN behind smoothing": ("int{}-g64", "method=rtn", "transforms=[smooth]"),
        "RTN behind AWQ": ("int{}-g64", "method=rtn", "transforms=[awq]"),
        "GPTQ": ("int{}-g64", "method=gptq"),
        "GPTQ behind AWQ": ("int{}-g64", "method=gptq", "transforms=[awq]"),
        "GPTQ behind a rotation": ("int{}-g64", "method=gptq", "transforms=[rotate]"),
        "SignRound, 70 steps": ("int{}-g64", f"method={{learned: {{start: {{rtn: {{importance: true}}}}, {few}}}}}"),
        "learned from GPTQ, 70 steps": ("int{}-g64", f"method={{learned: {{{few}}}}}"),
        "RTN, offsets": ("biased{}-g64", "method=rtn"),
        "HQQ, offsets": ("biased{}-g64", "method=hqq"),
        "GPTQ, offsets": ("biased{}-g64", "method={gptq: {rounds: 0}}"),
        "decoupleQ, offsets": ("biased{}-g64", "method={gptq: {rounds: 8}}"),
    }

    def at(bits: int, fmt: str, settings: Sequence[str]) -> Cell:
        return cell("w4a16-gptq-g64", rule(fmt.format(bits)), *settings, "export=[{to: qtool}]")

    lines = {label: tuple(at(bits, *way[:1], way[1:]) for bits in (2, 3, 4)) for label, way in methods.items()}
    return Table("method", plain("2 bits", "3 bits", "4 bits"), lines)


def eight_bits() -> Table:
    """FP8 and INT8 for weights and inputs, against 4-bit weights: https://arxiv.org/abs/2411.02355."""
    recipes = {
        "FP8, inputs by token": "fp8-dynamic",
        "FP8, static inputs": "fp8-static",
        "INT8, inputs by token": "w8a8-int8",
        "INT8, inputs by token, smoothed": "w8a8-int8-smooth",
        "INT8, weights alone": "w8a16",
        "INT4, weights alone, RTN, groups of 64": "w4a16-rtn-g64",
        "INT4, weights alone, AWQ, groups of 64": "w4a16-awq",
        "INT4, weights alone, GPTQ, groups of 64": "w4a16-gptq-g64",
    }
    texts = (Column("prose"), Column("source code", on_code))
    columns = (*texts, *(Column(f"{label}, with outliers", shows) for label, shows in texts))
    pairs = {label: [cell(name, variant=variant, code=True) for variant in VARIANTS] for label, name in recipes.items()}
    return Table("recipe", columns, {label: (a, a, b, b) for label, (a, b) in pairs.items()})


def ranks() -> Table:
    """A branch of low rank beside the codes, plain and whitened.

    https://arxiv.org/abs/2303.08302, https://arxiv.org/abs/2402.02446
    """

    def corrected(rank: int, fmt: str, method: str, whiten: str) -> Cell:
        branch = f", residuals: [{{low_rank: {{rank: {rank}, whiten: {whiten}}}}}]" if rank else ""
        return cell("w3a16-gptq-lowrank", rule(fmt, branch), f"method={method}")

    ways = {
        "RTN, 3 bits, plain": ("int3-g64", "rtn", "false"),
        "RTN, 3 bits, whitened": ("int3-g64", "rtn", "true"),
        "GPTQ, 3 bits, whitened": ("int3-g64", "gptq", "true"),
        "GPTQ, 2 bits, whitened": ("int2-g64", "gptq", "true"),
    }
    lines = {str(r): tuple(corrected(r, *way) for way in ways.values()) for r in (0, 8, 32, 64)}
    return Table("rank", plain(*ways), lines)


def drifts() -> Table:
    """What is made up for of the drift of inputs behind quantized layers.

    https://arxiv.org/abs/2504.02692, https://arxiv.org/abs/2505.11695
    """
    ways = {
        "nothing (GPTQ)": "0",
        "three quarters": "0.75",
        "all of it": "1.0",
        "all of it, hardly a ridge (GPTAQ, Qronos)": "1.0, drift_damp: 0.02",
    }
    formats = ("int2-g64", "int3-g64", "int4-g64", "nvfp4")

    def at(fmt: str, way: str) -> Cell:
        method = f"method={{gptq: {{rounds: 0, drift: {way}}}}}"
        return cell("w4a16-gptq-g64", rule(fmt), method, "export=[{to: qtool}]")

    lines = {label: tuple(at(fmt, way) for fmt in formats) for label, way in ways.items()}
    return Table("of the drift", plain("2 bits", "3 bits", "4 bits", "NVFP4"), lines)


def kinds() -> Table:
    """Only one kind of layer in FP4, weights and inputs: which ones it is hard for.

    https://arxiv.org/abs/2603.08747
    """
    names = ("q", "k", "v", "o", "gate", "up", "down")

    def alone(name: str, fmt: str) -> Cell:
        layers = f"{{match: '*.{name}_proj', weights: {fmt}, activations: {fmt}}}, {{match: '*', keep: true}}"
        settings = (f"layers=[{layers}]", "transforms=[]", "method=rtn", "export=[{to: qtool}]")
        return cell("mxfp4-hadamard", *settings)

    lines = {name: tuple(alone(name, fmt) for fmt in ("mxfp4", "nvfp4")) for name in names}
    return Table("layers", plain("MXFP4", "NVFP4"), lines)


VARIANTS: tuple[Variant, Variant] = ("off-grid", "outliers")
TABLES: dict[str, Callable[[], Table]] = {
    "rotations": rotations,
    "strengths": strengths,
    "calibrations": calibrations,
    "low-bits": low_bits,
    "eight-bits": eight_bits,
    "ranks": ranks,
    "drifts": drifts,
    "kinds": kinds,
}


def cells(names: Sequence[str] = ()) -> list[Cell]:
    """All cells of tables; of all tables if none is named."""
    return [one for name in names or TABLES for line in TABLES[name]().lines.values() for one in line]


def rows(name: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table as the page shows it; the least of a column is bold."""
    table, found = TABLES[name](), known()
    values = [
        [
            column.shows(found[one.key]) if one.key in found else None
            for column, one in zip(table.columns, line, strict=True)
        ]
        for line in table.lines.values()
    ]
    least = [min((v for v in column if v is not None), default=None) for column in zip(*values, strict=True)]

    def shown(value: float | None, best: float | None) -> str:
        if value is None:
            return ""
        return f"**{value:.3g}**" if value == best else f"{value:.3g}"

    lines = [
        (label, *(shown(value, best) for value, best in zip(line, least, strict=True)))
        for label, line in zip(table.lines, values, strict=True)
    ]
    return (table.corner, *(column.label for column in table.columns)), lines
