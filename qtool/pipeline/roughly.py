"""A model as a plan would leave it, rounded to nearest while it is read: for trying plans before one is carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from qtool.checkpoint._base import Layer, QuantizedCheckpoint, Static, TensorInfo
from qtool.methods.rtn import RTN
from qtool.numerics.threads.parallel import row_shares, shares, side_by_side
from qtool.pipeline.correct import fit
from qtool.pipeline.prepare import Job
from qtool.pipeline.requantize import origin
from qtool.pipeline.rows import row_parts
from qtool.pipeline.solve import informed, refuse_infinite
from qtool.plan import LayerPlan
from qtool.residuals._base import Correction, Tensors

Statics = dict[str, dict[str, Static]]
"""What inputs are rounded with where all tokens share that: by module and by the label of their format."""
Corrections = Mapping[str, Mapping[str, Sequence[Tensors]]]
"""What was found to be kept beside codes: by module and by the label of its plan, in order."""

Shares = Mapping[str, Mapping[str, float]]
"""Factor of rounding errors as a method would leave them: by module and by the label of its plan; 1 if missing."""


class Roughly(QuantizedCheckpoint):
    """A planned model.

    Args:
        job: the run, with the plan.
        importance: mean square of each input channel, float32 [K], by `Module.reads`.
        statics: of the inputs that need some.
        corrections: of the layers that have some; where nothing is known, codes are alone.
        shares: of rounding errors that remain, so that a model is as far from the original as a method would take it.
    """

    has_codes: ClassVar[bool] = False

    def __init__(
        self,
        job: Job,
        importance: Mapping[str, Tensor],
        statics: Statics,
        corrections: Corrections | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.job, self.origin, self.importance = job, job.checkpoint, importance
        self.found, self.shares = corrections or {}, shares or {}
        self.plans = {p.module.name: p for p in job.plan.layers if p.format}
        self.source, self.config = self.origin.source, self.origin.config
        self.family, self.files = self.origin.family, self.origin.files
        self.layers = {name: with_found(p, statics) for name, p in self.plans.items()}
        self.shared: dict[str, Tensor] = {}

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
        if name in self.shared:
            return self.shared[name]
        plan = self.plans.get(name.removesuffix(".weight"))
        if plan is None:
            return self.origin.tensor(name)
        nearest, known = Nearest(self.job, plan), self.importance.get(plan.module.reads)
        if beside := [c.to(self.job.device) for c in self.corrections(plan.module.name)]:
            w_hat = nearest(nearest.rest(self.origin.tensor(name), beside), known)
            for correction in beside:
                w_hat = correction.apply(w_hat)
            return w_hat
        parts = row_parts(plan.module.shape) if nearest.format.by_rows else [(0, plan.module.shape[0])]
        return torch.cat([self.nearest(nearest, self.origin.rows(name, *part)) for part in parts])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`; where embedding and output layer share a matrix, all of it is rounded once."""
        plan = self.plans.get(name.removesuffix(".weight"))
        if plan is None:
            return self.origin.rows(name, start, stop)
        if plan.module.kind == "embedding" and self.origin.tied:
            self.shared.setdefault(name, self.tensor(name))
        elif plan.format and plan.format.by_rows and not plan.residuals:
            return self.nearest(Nearest(self.job, plan), self.origin.rows(name, start, stop))
        return super().rows(name, start, stop)

    def nearest(self, nearest: Nearest, w: Tensor) -> Tensor:
        """Rows of a layer, [N, K], with what its method would leave of their rounding errors: float32 [N, K]."""
        plan, w = nearest.plan, w.to(self.job.device).float()
        w_hat, share = nearest(w, self.importance.get(plan.module.reads)), self.shares.get(plan.module.name, {})
        return w.lerp(w_hat, share[plan.label]) if plan.label in share else w_hat

    def corrections(self, module: str) -> Sequence[Correction]:
        """See `QuantizedCheckpoint.corrections`."""
        plan = self.plans[module]
        found = self.found.get(module, {}).get(plan.label, ())
        return [Correction(residual, tensors) for residual, tensors in zip(plan.residuals, found, strict=False)]

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


class Nearest:
    """Rounds rows of a module to nearest.

    Args:
        job: the run.
        plan: of the module, with a format.

    Attributes:
        format: of the plan, as `informed`.
    """

    def __init__(self, job: Job, plan: LayerPlan) -> None:
        assert plan.format is not None
        module = plan.module.name
        self.plan, self.device = replace(plan, method=RTN()), job.device
        self.format = informed(plan.format, job.checkpoint, (module,))
        self.same = origin(job.checkpoint, module, plan.format).same is not None

    def __call__(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """What a runtime decodes of some rows, [N, K] -> float32 [N, K]; of all rows where these share a scale.

        Args:
            w: the rows.
            importance: of inputs, float32 [K], where they are known.

        Raises:
            NumericsError: the result is not finite.
        """
        w = w.to(self.device).float()
        if self.same:
            return w
        known = None if importance is None else importance.to(self.device)

        def part(rows: tuple[int, int]) -> Tensor:
            here = w[slice(*rows)]
            params = self.format.fit(here, known)
            return self.format.decode(self.format.snap(here, params, known), params)

        parts = row_shares(len(w), self.device) if self.format.by_rows else [(0, len(w))]
        w_hat = torch.cat(side_by_side(part, parts, shares(len(parts), self.device)))
        refuse_infinite(w_hat, self.plan)
        return w_hat

    def rest(self, w: Tensor, corrections: Sequence[Correction]) -> Tensor:
        """What codes are chosen for, float32 [N, K]: less than the matrix if corrections were found before them."""
        w = w.to(self.device).float()
        if not any(residual.before for residual in self.plan.residuals):
            return w
        for correction in corrections:
            w = w - correction.apply(torch.zeros_like(w))
        return w

    def corrected(self, w: Tensor, importance: Tensor | None, gram: Tensor | None) -> tuple[Tensor, list[Correction]]:
        """What a runtime decodes of the codes alone, float32 [N, K], and what is kept beside them.

        Args:
            w: the whole matrix, [N, K].
            importance: of inputs, float32 [K], where they are known.
            gram: X^T X of inputs, float32 [K, K], where residuals ask for it.
        """
        w = w.to(self.device).float()
        if any(residual.before for residual in self.plan.residuals):
            corrections, rest = fit(self.plan.residuals, w, gram)
            return self(rest, importance), list(corrections)
        w_hat = self(w, importance)
        return w_hat, list(fit(self.plan.residuals, w - w_hat, gram)[0])
