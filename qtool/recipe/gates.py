"""The gates that a recipe or a command line may name: limits on what an evaluation finds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from qtool.errors import suggestion
from qtool.problems import mistake, show

AT_MOST = {
    "ppl": "ppl",
    "ppl_ratio": "ppl_ratio",
    "kld": "kld_mean",
    "kld_median": "kld_median",
    "kld_p90": "kld_p90",
    "kld_p95": "kld_p95",
    "kld_p99": "kld_p99",
    "kld_p999": "kld_p999",
    "kld_max": "kld_max",
    "rms_dp": "rms_dp",
}
AT_LEAST = {"top1": "top1"}
GATES = AT_MOST | AT_LEAST
"""Gate name -> attribute of `qtool.evaluate.result.Evaluation`."""


def _check_name(name: str) -> str:
    if name not in GATES:
        raise mistake(f"no gate is called {show(name)}", hint=suggestion(name, list(GATES)))
    return name


SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "number"} for name in GATES},
    "additionalProperties": False,
}
Gates = Annotated[dict[Annotated[str, AfterValidator(_check_name)], float], WithJsonSchema(SCHEMA)]
