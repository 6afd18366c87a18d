"""Bytes and seconds as people read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtool.evaluate.result import Evaluation, Gate, TaskEvaluation


def size(nbytes: float) -> str:
    """Decimal units, three to four digits: 98.4 MB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while nbytes >= 999.95 and power < len(units) - 1:
        nbytes, power = nbytes / 1000, power + 1
    return f"{nbytes:.0f} B" if power == 0 else f"{nbytes:.1f} {units[power]}"


def duration(seconds: float) -> str:
    """0.42 s, 4.2 s, 38 s, 2 min 18 s, 1 h 04 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def verdicts(evaluations: Iterable[Evaluation | TaskEvaluation]) -> list[str]:
    """A line for each gate: "PASS kld 0.0413 (95 % between 0.0403 and 0.0423), limit 0.05"."""
    return [f"{outcome(gate)} {gate.name} {found(gate)}, {limit(gate)}" for e in evaluations for gate in e.gates]


def outcome(gate: Gate) -> str:
    """PASS or FAIL."""
    return "PASS" if gate.passed else "FAIL"


def found(gate: Gate) -> str:
    """What was measured, with its confidence interval if it has one."""
    interval = "" if gate.low is None or gate.high is None else f" (95 % between {gate.low:.4g} and {gate.high:.4g})"
    return f"{gate.value:.4g}{interval}"


def limit(gate: Gate) -> str:
    """What was asked: "at most 0.05"."""
    return f"at {'least' if gate.at_least else 'most'} {gate.limit:g}"
