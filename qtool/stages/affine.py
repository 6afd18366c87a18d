"""Outputs are corrected row by row: y = a y_hat + b, whose factors go into scales and whose sums go into biases.

    min over a, b of | a (W_hat x) + b - W x |^2    over calibration tokens, for each row of W by itself

Rounding makes most outputs a little smaller, or larger, than they were. That is one number a row, which scales of
rows or groups take in without a bit more: a = cov(W x, W_hat x) / var(W_hat x), by the inputs' Gram matrix H in the
quantized model, of rounded inputs where a runtime rounds them. Where a layer has a bias, b gives outputs the mean that
they had in the model before, as `biases` does; where it has none, b is zero and
a = diag(W H W_hat^T) / diag(W_hat H W_hat^T). Each layer stands behind those that are corrected already. After
CacheQuant (https://arxiv.org/abs/2503.01323), which corrects what layers write so.

Everything stays as it was if the predictions of the whole model are not nearer to the original's on samples that
nothing was found from. Layers whose scales several rows share, or are too coarse, keep their rows. GPTQ's closed-form
scales are such factors already, group by group, so that behind it there is little to find.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.checkpoint._base import Layer, Module
from qtool.formats._base import Params
from qtool.methods._base import split
from qtool.plan.layers import Plan
from qtool.stages._base import StageResult, StageTask
from qtool.stages.absorb import divergence, on_cpu, scaled
from qtool.stages.biases import Biases, Correcting
from qtool.stats._base import InputStats, Statistic
from qtool.stats.gram import Gram
from qtool.stats.means import Means
from qtool.store.overlay import Overlaid

LARGEST = 2.0
"""Factors are between this and its inverse."""


class Affine(Biases):
    """Affine correction of outputs.

    Attributes:
        holdout: share of the samples that only decide whether anything changes.
    """

    holdout: float = Field(0.125, gt=0, lt=1)

    def misfit(self, plan: Plan) -> str | None:
        """See `Stage.misfit`."""
        if any(p.layer and has_rows(p.module, p.layer) for p in plan.layers):
            return None
        return "no matrix that all tokens go through has scales of rows or groups, and nothing beside the codes"

    def run(self, task: StageTask) -> StageResult:
        """See `Stage.run`."""
        assert task.tokens is not None  # see `needs_tokens`
        seen, unseen = split(len(task.tokens), self.holdout, task.seed)
        correction = Scaling(replace(task, tokens=task.tokens[seen]))
        biases = correction.all()
        params = on_cpu(correction.params)
        behind = replace(task, model=Overlaid(task.model, params, biases, self.name()), tokens=task.tokens[unseen])
        after, before = (divergence(t) for t in (behind, replace(behind, model=task.model)))
        about = {"matrices": float(len(params)), "biases": float(len(biases)), "mean factor": correction.mean}
        about |= {"held out before": before, "held out": min(after, before)}
        return StageResult(params, biases, about) if after < before else StageResult(about=about)


class Scaling(Correcting):
    """Factors of rows as well as biases; see `Correcting`.

    Attributes:
        params: of matrices whose rows were multiplied.
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Means, Gram})

    def __init__(self, task: StageTask) -> None:
        super().__init__(task)
        self.params = dict[str, Params]()
        self.factors = list[float]()

    @property
    def mean(self) -> float:
        """Of all factors."""
        return sum(self.factors) / max(len(self.factors), 1)

    def corrects(self, module: Module) -> bool:
        """See `Correcting.corrects`: every matrix that has rows, see `has_rows`."""
        layer = self.task.model.layers.get(module.name)
        return layer is not None and has_rows(module, layer)

    def correct(
        self, linear: nn.Linear, module: Module, wanted: Tensor, stats: InputStats
    ) -> Iterator[tuple[str, Tensor]]:
        """See `Correcting.correct`."""
        biased, h = f"{module.name}.bias" in self.names, stats[Gram].matrix
        quantized = self.task.model.matrix(module.name).to(h.device).quantized
        w, q = self.task.unrounded.tensor(f"{module.name}.weight").to(h), quantized.decode()
        a = factors(w, q, h, stats[Means].mean if biased else None, stats.tokens)
        if (params := scaled(quantized, a)) is not None:
            self.params[module.name] = params
            self.factors.append(float(a.mean()))
            q = replace(quantized, params=params).decode()
            linear.weight.data = q.to(linear.weight)
        if biased:
            yield from self.recentred(linear, module, q, wanted, stats[Means].mean)


def has_rows(module: Module, layer: Layer) -> bool:
    """Whether rows of a matrix, which all tokens go through, are what its scales make of its codes alone."""
    return module.expert is None and not layer.residuals and layer.format.group_rows == 1


def factors(w: Tensor, q: Tensor, h: Tensor, mean: Tensor | None, tokens: int) -> Tensor:
    """The best factor of each row, float32 [N]; 1 where outputs do not vary.

    Args:
        w: the matrix, float32 [N, K].
        q: what its codes decode to, [N, K].
        h: X^T X, float32 [K, K].
        mean: of inputs, float64 [K], which a bias takes; None: there is none.
        tokens: that both were summed over.
    """
    moved = q.double() @ (h.double() if mean is None else h.double() - tokens * torch.outer(mean, mean))
    both, own = (moved * w.double()).sum(1), (moved * q.double()).sum(1)
    found = torch.where(own > 0, both / own.clamp_min(torch.finfo(own.dtype).tiny), 1.0)
    return found.clamp(1 / LARGEST, LARGEST).float()
