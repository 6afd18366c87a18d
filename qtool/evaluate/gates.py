"""Gates: limits on what an evaluation may find, for scripts that must stop when quality is not good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from qtool.errors import GateError, UsageError, suggestion
from qtool.evaluate.result import Evaluation, Gate, TaskEvaluation
from qtool.recipe.gates import AT_LEAST, GATES

ERRORS = {"ppl": "ppl_error", "ppl_ratio": "ppl_ratio_error", "kld": "kld_error", "top1": "top1_error"}
"""Gate name -> attribute with the standard error of what it limits."""
NORMAL = 1.96
"""Standard errors on each side of a mean that 95 % of a normal distribution lie within."""


def parse_gates(texts: Iterable[str]) -> dict[str, float]:
    """`["kld=0.05", "top1=0.9"]` -> limits by gate name.

    Raises:
        UsageError: not of the form name=number, or a gate that does not exist.
    """
    gates = parsed_gates(texts, "e.g. kld=0.05")
    validate_gates(gates, compared=True)
    return gates


def parsed_gates(texts: Iterable[str], wanted: str) -> dict[str, float]:
    """Limits by name, whatever these are. Raises UsageError: not of the form name=number."""
    gates = {}
    for text in texts:
        name, _, limit = text.partition("=")
        try:
            gates[name.strip()] = float(limit)
        except ValueError:
            raise UsageError("a gate is no name=number", wanted=wanted, found=repr(text)) from None
    return gates


def validate_gates(gates: Mapping[str, float], compared: bool) -> None:
    """Refuses gates that cannot be checked, before anything is computed.

    Args:
        gates: limits by name.
        compared: True if there is a baseline.

    Raises:
        UsageError: no such gate, a limit that is no finite number, or one that needs a baseline and there is none.
    """
    for name, limit in gates.items():
        if name not in GATES:
            raise UsageError(f"no gate is called {name!r}", hint=suggestion(name, list(GATES)))
        if not math.isfinite(limit):
            raise UsageError(f"the limit of gate {name}", wanted="a finite number", found=limit)
        if name != "ppl" and not compared:
            raise UsageError(f"gate {name} compares with a baseline and none is given", hint="add --baseline MODEL")


def judge(evaluation: Evaluation, gates: Mapping[str, float]) -> tuple[Gate, ...]:
    """Holds an evaluation against limits; NaN misses every gate. Raises UsageError: see `validate_gates`."""
    validate_gates(gates, evaluation.base_ppl is not None)
    return tuple(_gate(evaluation, name, limit) for name, limit in gates.items())


def _gate(evaluation: Evaluation, name: str, limit: float) -> Gate:
    value, at_least = getattr(evaluation, GATES[name]), name in AT_LEAST
    error = getattr(evaluation, ERRORS[name]) if name in ERRORS else None
    low, high = (None, None) if error is None else (value - NORMAL * error, value + NORMAL * error)
    passed = value >= limit if at_least else value <= limit
    return Gate(name=name, limit=limit, at_least=at_least, value=value, low=low, high=high, passed=passed)


DROP = "_drop"
"""What stands behind a task's name in the gate that says how many percentage points it may lose."""


def parse_task_gates(texts: Iterable[str]) -> dict[str, float]:
    """`["arc_easy_drop=0.5"]` -> limits by gate name. Raises UsageError: not of that form."""
    gates = parsed_gates(texts, f"e.g. arc_easy{DROP}=0.5")
    for name, limit in gates.items():
        if not name.endswith(DROP):
            raise UsageError("a gate of --tasks", wanted=f"TASK{DROP}=POINTS", found=f"{name}={limit:g}")
    return gates


def validate_task_gates(gates: Mapping[str, float], tasks: Iterable[str], compared: bool) -> None:
    """Refuses gates that cannot be checked, before anything is computed. Raises UsageError: see `validate_gates`."""
    known = [task + DROP for task in tasks]
    for name, limit in gates.items():
        if name not in known:
            raise UsageError(f"no gate is called {name!r}", hint=suggestion(name, known))
        if not math.isfinite(limit):
            raise UsageError(f"the limit of gate {name}", wanted="a finite number", found=limit)
        if not compared:
            raise UsageError(f"gate {name} compares with a baseline and none is given", hint="add --baseline MODEL")


def judge_tasks(found: TaskEvaluation, gates: Mapping[str, float]) -> tuple[Gate, ...]:
    """Holds tasks against the percentage points that they may lose, each by the first metric that it lists.

    Raises:
        UsageError: that metric is no number for each question, so that nothing says what was lost.
    """
    judged = []
    for name, limit in gates.items():
        score = next(s for s in found.scores if s.task == name.removesuffix(DROP))
        if score.difference is None:
            raise UsageError(f"gate {name}", wanted="a metric of each question", found=score.metric)
        lost = (-100 if score.higher_is_better else 100) * score.difference
        error = None if score.difference_error is None else 100 * NORMAL * score.difference_error
        low, high = (None, None) if error is None else (lost - error, lost + error)
        gate = Gate(name=name, limit=limit, at_least=False, value=lost, low=low, high=high, passed=lost <= limit)
        judged.append(gate)
    return tuple(judged)


def refuse_missed(gates: Sequence[Gate]) -> None:
    """Raises GateError: names every gate that is missed, with its limit and what was measured."""
    missed = [
        f"{gate.name} wanted {'at least' if gate.at_least else 'at most'} {gate.limit:g}, found {gate.value:.6g}"
        for gate in gates
        if not gate.passed
    ]
    if missed:
        raise GateError(f"quality misses {len(missed)} of {len(gates)} gates: " + "; ".join(missed))
