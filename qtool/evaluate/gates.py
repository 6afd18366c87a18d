"""Gates: limits on what an evaluation may find, for scripts that must stop when quality is not good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qtool.errors import GateError, UsageError, nearest
from qtool.evaluate.result import Evaluation
from qtool.recipe.gates import AT_LEAST, GATES


def parse_gates(texts: Iterable[str]) -> dict[str, float]:
    """`["kld=0.05", "top1=0.9"]` -> limits by gate name.

    Raises:
        UsageError: not of the form name=number, or a gate that does not exist.
    """
    gates = {}
    for text in texts:
        name, _, limit = text.partition("=")
        try:
            gates[name.strip()] = float(limit)
        except ValueError:
            raise UsageError("a gate is no name=number", wanted="e.g. kld=0.05", found=repr(text)) from None
    validate_gates(gates, compared=True)
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
            raise UsageError(f"no gate is called {name!r}", hint=nearest(name, list(GATES)))
        if not math.isfinite(limit):
            raise UsageError(f"the limit of gate {name}", wanted="a finite number", found=limit)
        if name != "ppl" and not compared:
            raise UsageError(f"gate {name} compares with a baseline and none is given", hint="add --baseline MODEL")


def check_gates(evaluation: Evaluation, gates: Mapping[str, float]) -> None:
    """Holds an evaluation against limits.

    Raises:
        UsageError: see `validate_gates`.
        GateError: names every gate that is missed, with its limit and what was measured.
    """
    validate_gates(gates, evaluation.base_ppl is not None)
    missed = []
    for name, limit in gates.items():
        found = getattr(evaluation, GATES[name])
        good = found >= limit if name in AT_LEAST else found <= limit  # NaN misses every gate
        if not good:
            bound = "at least" if name in AT_LEAST else "at most"
            missed.append(f"{name} wanted {bound} {limit:g}, found {found:.6g}")
    if missed:
        raise GateError(f"quality misses {len(missed)} of {len(gates)} gates: " + "; ".join(missed))
