"""What was measured of a model, as rows for Markdown and HTML: gates, evaluations, and well-known files beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qtool.evaluate.gates import NORMAL
from qtool.evaluate.result import Evaluation, Gate, TaskEvaluation, TaskScore
from qtool.report.meaning import ANCHORS, meaning
from qtool.report.model import Report
from qtool.report.summary import bits_per_weight, number, percent


@dataclass(frozen=True)
class AnchorRow:
    """A mean KL divergence, of a well-known file or (`own`) of this model, with what it means."""

    name: str
    kld: float
    bits: float
    words: str
    own: bool = False


def gates(report: Report) -> list[tuple[str, Gate]]:
    """(text or harness, gate) of everything that was held against a limit."""
    texts = [(e.text, gate) for e in report.evaluations for gate in e.gates]
    return texts + [(f"lm-evaluation-harness {e.harness}", gate) for e in report.tasks for gate in e.gates]


def outcome(report: Report) -> str | None:
    """FAIL if any gate is missed, PASS if there are some; None if there are none."""
    found = [gate.passed for _, gate in gates(report)]
    return ("PASS" if all(found) else "FAIL") if found else None


def divergences(report: Report) -> list[Evaluation]:
    """Evaluations that compared with a baseline."""
    return [e for e in report.evaluations if e.kld_mean is not None]


def anchor_rows(report: Report) -> list[AnchorRow]:
    """Well-known files and this model's evaluations, by divergence."""
    rows = [AnchorRow(*anchor) for anchor in ANCHORS]
    for e in divergences(report):
        assert e.kld_mean is not None
        name = f"this model on {e.text}, run by {e.runtime}"
        rows.append(AnchorRow(name, e.kld_mean, bits_per_weight(report), meaning(e.kld_mean), own=True))
    return sorted(rows, key=lambda row: row.kld)


def evaluation_rows(report: Report) -> list[tuple[str, list[str]]]:
    """(measure, its value in each evaluation); measures that no evaluation has are left out."""
    measures: list[tuple[str, Callable[[Evaluation], str | None]]] = [
        ("text", lambda e: e.text),
        ("run by", lambda e: e.runtime),
        ("scored tokens", lambda e: f"{e.tokens:,}"),
        ("chunks", lambda e: f"{e.chunks:,} of {e.context:,} tokens"),
        ("perplexity", lambda e: f"{e.ppl:.4f} ± {e.ppl_error:.2g}"),
        ("perplexity of the baseline", lambda e: None if e.base_ppl is None else f"{e.base_ppl:.4f}"),
        ("perplexity ratio", with_ratio_error),
        ("KL divergence, mean (nats)", with_error),
        ("KL divergence, median", lambda e: optional(e.kld_median)),
        ("KL divergence, 90 %", lambda e: optional(e.kld_p90)),
        ("KL divergence, 95 %", lambda e: optional(e.kld_p95)),
        ("KL divergence, 99 %", lambda e: optional(e.kld_p99)),
        ("KL divergence, 99.9 %", lambda e: optional(e.kld_p999)),
        ("KL divergence, largest", lambda e: optional(e.kld_max)),
        ("same most likely token", with_top1_error),
        ("Δp of the right token, mean", lambda e: None if e.dp_mean is None else f"{100 * e.dp_mean:+.2f} %"),
        ("Δp of the right token, RMS", lambda e: None if e.rms_dp is None else f"{100 * e.rms_dp:.2f} %"),
    ]
    rows = [(label, [value(e) for e in report.evaluations]) for label, value in measures]
    return [(label, [v or "-" for v in values]) for label, values in rows if any(values)]


def with_ratio_error(e: Evaluation) -> str | None:
    """Perplexity over the baseline's, and the standard error of paired differences."""
    if e.ppl_ratio is None:
        return None
    return f"{e.ppl_ratio:.4f}" + ("" if e.ppl_ratio_error is None else f" ± {e.ppl_ratio_error:.2g}")


def with_error(e: Evaluation) -> str | None:
    """Mean KL divergence and its standard error."""
    if e.kld_mean is None:
        return None
    return number(e.kld_mean) + ("" if e.kld_error is None else f" ± {e.kld_error:.2g}")


def with_top1_error(e: Evaluation) -> str | None:
    """Share of positions with the same most likely token, and its standard error."""
    if e.top1 is None:
        return None
    return percent(e.top1) + ("" if e.top1_error is None else f" ± {100 * e.top1_error:.2g}")


def optional(x: float | None) -> str | None:
    """A number, or nothing."""
    return None if x is None else number(x)


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task as text: of this model, of the baseline, and what was won or lost."""

    task: str
    metric: str
    questions: str
    value: str
    base: str
    difference: str


TASK_HEADER = ("task", "metric", "questions", "this model", "baseline", "difference")


def task_rows(evaluations: Iterable[TaskEvaluation]) -> list[TaskRow]:
    """Every score of every task."""
    return [task_row(score) for e in evaluations for score in e.scores]


def task_row(score: TaskScore) -> TaskRow:
    """A score; the difference has its 95 % confidence interval."""
    difference = "-"
    if score.difference is not None:
        spread = score.difference_error
        interval = "" if spread is None else f" (95 %: {spread_of(score.difference, spread)})"
        difference = f"{score.difference:+.4f}{interval}"
    error = "" if score.error is None else f" ± {score.error:.4f}"
    base = "-" if score.base is None else f"{score.base:.4f}"
    return TaskRow(score.task, score.metric, f"{score.samples:,}", f"{score.value:.4f}{error}", base, difference)


def spread_of(mean: float, error: float) -> str:
    """The ends of a 95 % confidence interval."""
    return f"{mean - NORMAL * error:+.4f} to {mean + NORMAL * error:+.4f}"
