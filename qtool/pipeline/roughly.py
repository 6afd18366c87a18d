"""A model as a plan would leave it, rounded to nearest while it is read: for trying plans before one is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from torch import Tensor

from qtool.checkpoint._base import Layer, QuantizedCheckpoint, Static, TensorInfo
from qtool.methods.rtn import RTN
from qtool.pipeline.prepare import Job
from qtool.pipeline.solve import solve
from qtool.plan import LayerPlan
from qtool.residuals._base import Matrix
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels

Statics = dict[str, dict[str, Static]]
"""What inputs are rounded with where all tokens share that: by module and by the label of their format."""


class Roughly(QuantizedCheckpoint):
    """A planned model.

    Args:
        job: the run, with the plan.
        importance: mean square of each input channel, float32 [K], by `Module.reads`.
        statics: of the inputs that need some.
    """

    def __init__(self, job: Job, importance: Mapping[str, Tensor], statics: Statics) -> None:
        self.job, self.origin, self.importance = job, job.checkpoint, importance
        self.plans = {p.module.name: p for p in job.plan.layers if p.format}
        self.source, self.config = self.origin.source, self.origin.config
        self.family, self.files = self.origin.family, self.origin.files
        self.layers = {name: with_found(p, statics) for name, p in self.plans.items()}

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self.origin.names()

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return self.origin.info(name)

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`: that of the model."""
        return self.origin.fingerprint()

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`; rounds it."""
        plan = self.plans.get(name.removesuffix(".weight"))
        if plan is None:
            return self.origin.tensor(name)
        return round_off(self.job, plan, self.importance.get(plan.module.reads)).decode()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`; of a matrix that is rounded, all of it is."""
        plain = name.removesuffix(".weight") not in self.plans
        return self.origin.rows(name, start, stop) if plain else super().rows(name, start, stop)

    def matrix(self, module: str) -> NoReturn:
        """Nobody asks for codes. Raises RuntimeError."""
        raise RuntimeError(f"{module} is only tried")


def with_found(plan: LayerPlan, statics: Statics) -> Layer:
    """A layer with what its inputs are rounded with."""
    layer = plan.layer
    assert layer is not None
    if not layer.unmeasured or layer.activations is None:
        return layer
    return replace(layer, static=statics[plan.module.name][layer.activations.label])


def round_off(job: Job, plan: LayerPlan, importance: Tensor | None) -> Matrix:
    """A matrix rounded to nearest, with importances of its inputs, float32 [K], where they are known."""
    stats = None
    if importance is not None:
        stats = InputStats(len(importance), frozenset({Channels}), job.device)
        stats[Channels].sums, stats.tokens = importance.to(job.device), 1
    method = RTN(importance=stats is not None)
    return Matrix(solve(replace(plan, method=method, residuals=()), job.checkpoint, stats, job.device).quantized)
