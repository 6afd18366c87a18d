"""Numbers that Markdown and HTML show beside the report's own: totals, rows by role, the verdict. No markup here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from qtool.evaluate.result import Evaluation
from qtool.report.meaning import meaning
from qtool.report.model import CourseEntry, FinishEntry, LayerEntry, Report
from qtool.report.units import duration, size

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "embedding", "head")
"""The order in which tables and legends show roles; others follow in alphabetical order."""


@dataclass(frozen=True)
class SizeRow:
    """All modules of one role that are stored alike."""

    role: str
    format: str
    methods: str
    layers: int
    weights: int
    nbytes: int
    share: float

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class ErrorRow:
    """Signal-to-error ratios of one role's layers, dB."""

    role: str
    layers: int
    best: float
    median: float
    worst: float
    worst_layer: str


@dataclass(frozen=True)
class ExpertRow:
    """Calibration tokens that reached the experts of one block."""

    block: int
    experts: int
    least: int
    median: float
    most: int


@dataclass(frozen=True)
class Notice:
    """Something the reader should see first. `layers` are the names it is about, if it is about layers."""

    kind: str
    text: str
    layers: tuple[str, ...] = ()


def roles(report: Report) -> list[str]:
    """Roles that occur, in the order of display."""
    found = {layer.role for layer in report.layers}
    return [r for r in ROLES if r in found] + sorted(found - set(ROLES))


def model_bytes(report: Report) -> int:
    """What the model's tensors take as stored, without file headers."""
    return sum(layer.nbytes for layer in report.layers) + report.other_bytes


def bits_per_weight(report: Report) -> float:
    """Over the whole model, kept tensors included."""
    return 8 * model_bytes(report) / report.parameters


def weights(layer: LayerEntry) -> int:
    """Number of weights of a module."""
    return layer.shape[0] * layer.shape[1]


def stored_as(layer: LayerEntry) -> str:
    """Format label of the weight, with that of the activations."""
    return "kept" if layer.format is None else with_inputs(layer.format, layer.activations)


def with_inputs(label: str, activations: str | None) -> str:
    """The label of a weight's format with that of its inputs, if they have one."""
    return f"{label} · activations {activations}" if activations else label


def size_rows(report: Report) -> list[SizeRow]:
    """By role, then by format in order of appearance; norms and biases are not among them."""
    total = model_bytes(report)
    rows = []
    for role in roles(report):
        groups: dict[str, list[LayerEntry]] = {}
        for layer in report.layers:
            if layer.role == role:
                groups.setdefault(stored_as(layer), []).append(layer)
        for label, group in groups.items():
            nbytes = sum(layer.nbytes for layer in group)
            methods = ", ".join(sorted({layer.method for layer in group if layer.method}))
            rows.append(SizeRow(role, label, methods, len(group), sum(map(weights, group)), nbytes, nbytes / total))
    return rows


def measures_output(report: Report) -> bool:
    """True if calibration measured output errors, so that these are shown; else weight errors are."""
    return any(layer.output_error_db is not None for layer in report.layers)


def errors(report: Report) -> list[tuple[LayerEntry, float]]:
    """Quantized layers with the signal-to-error ratio that plots and tables show, dB."""
    key = "output_error_db" if measures_output(report) else "weight_error_db"
    return [(layer, db) for layer in report.layers if (db := getattr(layer, key)) is not None]


def finite(values: Iterable[float]) -> list[float]:
    """Without infinities (exact layers) and NaN."""
    return [v for v in values if math.isfinite(v)]


def error_rows(report: Report) -> list[ErrorRow]:
    """By role."""
    rows = []
    for role in roles(report):
        found = [(db, layer.name) for layer, db in errors(report) if layer.role == role]
        if found:
            worst, name = min(found, key=lambda pair: pair[0])
            ratios = [db for db, _ in found]
            rows.append(ErrorRow(role, len(found), max(ratios), median(ratios), worst, name))
    return rows


def expert_rows(report: Report) -> list[ExpertRow]:
    """By block; none if nothing was calibrated, or there are no experts."""
    blocks: dict[int, dict[int, int]] = {}
    for layer in report.layers:
        if layer.expert is not None and layer.block is not None:
            tokens = blocks.setdefault(layer.block, {})
            tokens[layer.expert] = max(layer.tokens, tokens.get(layer.expert, 0))
    counts = {block: list(tokens.values()) for block, tokens in blocks.items()}
    return [ExpertRow(i, len(n), min(n), median(n), max(n)) for i, n in counts.items() if max(n)]


def notices(report: Report) -> list[Notice]:
    """Fallbacks (one notice per reason), artifacts that were not verified, warnings; in this order."""
    reasons: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.fallback:
            reasons.setdefault(layer.fallback, []).append(layer.name)
    found = [Notice("fallback", reason, tuple(names)) for reason, names in reasons.items()]
    found += [
        Notice("not verified", f"{a.kind} ({a.path}) was not read back and compared.")
        for a in report.artifacts
        if not a.verified
    ]
    return found + [Notice("warning", text) for text in report.warnings]


def main_evaluation(report: Report) -> Evaluation | None:
    """The evaluation that the verdict quotes: the first that has a baseline, else the first."""
    compared = [e for e in report.evaluations if e.kld_mean is not None]
    return next(iter(compared or report.evaluations), None)


def verdict(report: Report) -> str:
    """One or two sentences: what became of the size, and what it cost."""
    after = model_bytes(report)
    smoke = ""
    if report.limited_blocks is not None:
        smoke = f"Smoke run of {report.limited_blocks} decoder block{'s' * (report.limited_blocks != 1)}: "
    line = (
        f"{smoke}{size(report.source_bytes)} became {size(after)} ({percent(after / report.source_bytes)}), "
        f"{bits_per_weight(report):.2f} bits per weight of the whole model."
    )
    e = main_evaluation(report)
    if e is None:
        return line + " Quality was not measured."
    if e.kld_mean is None or e.ppl_ratio is None:
        return line + f" Perplexity {e.ppl:.4g} on {e.text}."
    return line + f" KL divergence {number(e.kld_mean)} nats per token, perplexity {change(e.ppl_ratio)} on {e.text}."


def cards(report: Report) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the key numbers."""
    after = model_bytes(report)
    found = [
        ("size", size(after), f"{percent(after / report.source_bytes)} of {size(report.source_bytes)}"),
        ("bits per weight", f"{bits_per_weight(report):.2f}", f"of the whole model, {report.parameters:,} parameters"),
    ]
    e = main_evaluation(report)
    if e is not None:
        if e.kld_mean is not None:
            found.append(("KL divergence", number(e.kld_mean), f"nats per token; {meaning(e.kld_mean)}"))
        remark = f"± {e.ppl_error:.2g}" if e.base_ppl is None else f"± {e.ppl_error:.2g}; baseline {e.base_ppl:.4g}"
        found.append(("perplexity", f"{e.ppl:.4g}", remark))
        if e.top1 is not None:
            found.append(("top-1 agreement", percent(e.top1), "same most likely token"))
    ratios = finite(db for _, db in errors(report))
    if ratios:
        kind = "layer outputs" if measures_output(report) else "weights"
        found.append(("median error", f"{median(ratios):.1f} dB", f"of {kind}; worst {min(ratios):.1f} dB"))
    if report.stages:
        found.append(("time", duration(sum(s.seconds for s in report.stages)), "all stages"))
        found.append(("peak memory", size(max(s.peak_bytes for s in report.stages)), "resident, whole process"))
    return found


def loss_names(report: Report) -> list[str]:
    """What methods that solve blocks measured: heads of a table's columns."""
    return list(dict.fromkeys(name for entry in report.blocks for name in entry.losses))


def best_step(course: Sequence[CourseEntry]) -> int | None:
    """After how many steps held-out samples lost least; None if nothing was trained."""
    return min(course, key=lambda at: at.held_out).step if course else None


def measured(stage: FinishEntry) -> str:
    """What a stage has to say, in a line."""
    pairs = ((key, number(v) if isinstance(v, float) else v) for key, v in stage.about.items())
    return ", ".join(f"{key} {value}" for key, value in pairs)


def number(x: float) -> str:
    """Three significant digits."""
    return f"{x:#.3g}".rstrip(".")


def percent(share: float) -> str:
    """0.366 -> "36.6 %"."""
    return f"{100 * share:.1f} %"


def change(ratio: float) -> str:
    """1.021 -> "+2.1 %"."""
    return f"{round(100 * (ratio - 1), 1) + 0.0:+.1f} %"  # never -0.0


def decibels(db: float | None) -> str:
    """One decimal; exact layers say so."""
    if db is None:
        return "-"
    return "exact" if db == math.inf else f"{db:.1f}"
