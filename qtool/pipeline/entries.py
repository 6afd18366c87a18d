"""What the report says about a module, and the sums of squares behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add

from torch import Tensor

from qtool.numerics.metrics import energy, ratio_db
from qtool.plan import LayerPlan
from qtool.report.model import LayerEntry
from qtool.stats._base import InputStats
from qtool.stats.gram import gram_of


@dataclass
class Sums:
    """Squares of a matrix, of its error, and of the outputs of both; grown part by part.

    Attributes:
        signal, error: of W and W - W_hat.
        output, output_error: of their outputs.
        target_error: of the outputs of T - W_hat, where the method aimed at T, which is W unless it says otherwise.
    """

    signal: float = 0.0
    error: float = 0.0
    output: float = 0.0
    output_error: float = 0.0
    target_error: float = 0.0

    @classmethod
    def of(cls, w: Tensor, w_hat: Tensor, gram: Tensor | None, target: Tensor | None = None) -> Sums:
        """Those of some rows, [rows, K]; outputs are known from the Gram matrix of the inputs, [K, K]."""
        if gram is None:
            return cls(energy(w), energy(w - w_hat))
        error = energy(w - w_hat, gram)
        aimed = error if target is None or target is w else energy(target - w_hat, gram)
        return cls(energy(w), energy(w - w_hat), energy(w, gram), error, aimed)

    @property
    def aimed_elsewhere(self) -> bool:
        """True if the method aimed at another matrix than W."""
        return self.target_error != self.output_error

    def __add__(self, other: Sums) -> Sums:
        return Sums(*map(add, vars(self).values(), vars(other).values()))

    def errors(self, measured: bool) -> dict[str, float | None]:
        """The report's fields; those of outputs only where their Gram matrix was measured."""
        return {
            "weight_error_db": ratio_db(self.signal, self.error),
            "output_error_db": ratio_db(self.output, self.output_error) if measured else None,
            "target_error_db": ratio_db(self.output, self.target_error) if self.aimed_elsewhere else None,
        }


def kept_entry(plan: LayerPlan) -> LayerEntry:
    """The entry of a module without a format."""
    n, k = plan.module.shape
    return LayerEntry(
        name=plan.module.name,
        role=plan.module.role,
        block=plan.module.block,
        expert=plan.module.expert,
        shape=plan.module.shape,
        format=None,
        method=None,
        activations=None,
        bits_per_weight=plan.bits / (n * k),
        nbytes=plan.bits // 8,
        weight_error_db=None,
        output_error_db=None,
        tokens=0,
        fallback=plan.fallback,
        seconds=0.0,
    )


def solved_entry(
    plan: LayerPlan, method: str, stats: InputStats | None, sums: Sums, remarks: Iterable[str | None], seconds: float
) -> LayerEntry:
    """The entry of a module with a format.

    Args:
        plan: of the module.
        method: how its codes were chosen.
        stats: of its input; None without data.
        sums: over all of its rows.
        remarks: what was done otherwise than asked, and why.
        seconds: solving it took.
    """
    assert plan.layer is not None
    found = {
        "format": plan.layer.weight_label,
        "method": method,
        "activations": plan.activations.label if plan.activations else None,
        "tokens": stats.tokens if stats else 0,
        "fallback": "; ".join(dict.fromkeys(filter(None, remarks))) or None,
        "seconds": seconds,
    }
    return kept_entry(plan).model_copy(update=found | sums.errors(gram_of(stats) is not None))


def mean_db(entries: Sequence[LayerEntry]) -> float | None:
    """Mean error of layers, of their outputs where these were measured; exact layers are left out."""
    errors = (e.weight_error_db if e.output_error_db is None else e.output_error_db for e in entries)
    found = [e for e in errors if e is not None and math.isfinite(e)]
    return sum(found) / len(found) if found else None
