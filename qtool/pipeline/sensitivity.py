"""What every layer would cost in every format that a budget allows: the loss of rounding it, from one calibration.

A candidate's matrix is rounded for real, with importances of its inputs, and its error is looked at where it matters:
mean over tokens of half the squared gradient of each output times its squared error, nats per token.

Shape letters: S samples, T tokens of one, R tokens that a module reads, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from qtool.allocate.decisions import Decision
from qtool.allocate.slopes import LayerRecord, Slopes
from qtool.calibrate.inputs import rounded
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Layer
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.roughly import Statics, round_off, with_found
from qtool.pipeline.rows import row_parts
from qtool.pipeline.solver import with_static
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.values import Values


@dataclass
class Priced:
    """What one calibration says about all plans.

    Attributes:
        costs: nats per token, by module and by the label of its plan.
        importance: mean square of each input channel, float32 [K], by `Module.reads`.
        statics: what inputs are rounded with.
    """

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    statics: Statics = field(default_factory=dict)


class Pricing:
    """Finds what options cost.

    Args:
        job: the run.
        open_: what is to be decided.
        tokens: int64 [S, T].
    """

    def __init__(self, job: Job, open_: Sequence[Decision], tokens: Tensor) -> None:
        self.job, self.tokens, self.found = job, tokens, Priced()
        self.options: dict[str, dict[str, LayerPlan]] = {}
        for p in (p for decision in open_ for option in decision.options for p in option):
            self.options.setdefault(p.module.name, {})[p.label] = p
        everything = job.plan.recipe.calibration.experts == "all"
        self.walker = Walker(job.checkpoint, job.device, job.dtype, everything)

    def run(self, listener: Listener) -> Priced:
        """Everything, from one way forth and back.

        Raises:
            NumericsError: logits, gradients or a rounded matrix are not finite.
        """
        blocks = len(self.walker.blocks)
        listener(Event("allocate", 0, blocks, "gradients"))
        slopes = Slopes(self.walker, self.tokens, self.job.plan.recipe.calibration.seed)
        for done, (i, seen) in enumerate(slopes.blocks(), 1):
            for m in self.walker.modules[i]:
                if m.name in self.options and m.name in seen:
                    stats = self.measure(m.name, m.reads, seen[m.name].x)
                    self.price(m.name, partial(self.inner, seen=seen[m.name], stats=stats))
            listener(Event("allocate", done, blocks, f"block {i}"))
        for name, plans in self.options.items():
            module = next(iter(plans.values())).module
            if module.block is not None:
                self.unseen(name)
                continue
            read = None if module.kind == "embedding" else slopes.head.inputs()
            known = None if read is None else self.measure(name, module.reads, read)
            self.price(name, partial(self.outer, slopes=slopes, stats=known))
        return self.found

    def measure(self, name: str, reads: str, x: Tensor) -> InputStats:
        """Statistics of what a module reads, [R, K]."""
        rounding = {p.activations.label: p for p in self.options[name].values() if p.activations}
        static = {label: p for label, p in rounding.items() if p.activations and p.activations.static}
        stats = InputStats(x.shape[1], frozenset({Channels, Values} if static else {Channels}), self.job.device)
        stats.add(x)
        self.found.importance[reads] = stats[Channels].importance.cpu()
        for label, p in static.items():
            if (found := with_static(p, stats).static) is not None:
                self.found.statics.setdefault(name, {})[label] = found
        return stats

    def price(self, name: str, cost: Callable[[LayerPlan], float]) -> None:
        """Notes what the options of a module cost."""
        own = {label: cost(p) / self.tokens.numel() if p.format else 0.0 for label, p in self.options[name].items()}
        self.found.costs[name] = own

    def unseen(self, name: str) -> None:
        """An expert that no token went to costs what those of its layer do on average; nothing if none was seen."""
        if name in self.found.costs:
            return
        module = next(iter(self.options[name].values())).module
        self.found.costs[name] = {}
        for label in self.options[name]:
            others = [
                self.found.costs[other][label]
                for other, plans in self.options.items()
                if other in self.found.costs
                and label in self.found.costs[other]
                and (m := plans[label].module).block == module.block
                and m.role == module.role
            ]
            self.found.costs[name][label] = sum(others) / max(1, len(others))

    def inner(self, plan: LayerPlan, seen: LayerRecord, stats: InputStats) -> float:
        """Half the squared errors of what a linear layer makes of its inputs, times squared gradients, summed."""
        matrix = round_off(self.job, plan, stats[Channels].importance)
        layer, total, x = with_found(plan, self.found.statics), 0.0, seen.x.float()
        behind = self.behind(seen.x, layer)
        for a, b in row_parts(plan.module.shape):
            w, w_hat = self.weights(plan, a, b), matrix.rows(a, b).decode().to(self.job.device)
            total += weighed(x, behind, w, w_hat, seen.squares[:, a:b])
        return total

    def outer(self, plan: LayerPlan, slopes: Slopes, stats: InputStats | None) -> float:
        """The same of the token embedding, of the output layer, or of both where they share a matrix."""
        embeds, total = plan.module.kind == "embedding", 0.0
        matrix = round_off(self.job, plan, None if stats is None else stats[Channels].importance)
        layer = with_found(plan, self.found.statics)
        for a, b in row_parts(plan.module.shape):
            w, w_hat = self.weights(plan, a, b), matrix.rows(a, b).decode().to(self.job.device)
            if not embeds or self.job.checkpoint.tied:
                seen = slopes.head.seen(a, b)
                total += weighed(seen.x.float(), self.behind(seen.x, layer), w, w_hat, seen.squares)
            if embeds:
                total += self.looked_up(w - w_hat, a, slopes)
        return total

    def looked_up(self, error: Tensor, first: int, slopes: Slopes) -> float:
        """The same of rows of the embedding, from `first` on, that tokens look up: [N, K]."""
        assert slopes.embedded is not None
        here = (self.tokens >= first) & (self.tokens < first + len(error))
        rows = error[self.tokens[here].to(error.device) - first]
        rows = rows * self.job.checkpoint.family.embedding_scale(self.job.checkpoint.config)
        squares = slopes.embedded[here.to(slopes.embedded.device)].to(rows)
        return float((rows.square_() * squares).sum(dtype=torch.float64)) / 2

    def behind(self, x: Tensor, layer: Layer) -> Tensor | None:
        """Inputs, [R, K], as a runtime rounds them; None: it does not."""
        return rounded(x, layer).float() if layer.activations else None

    def weights(self, plan: LayerPlan, start: int, stop: int) -> Tensor:
        """Rows of a matrix, float32."""
        return self.job.checkpoint.rows(f"{plan.module.name}.weight", start, stop).to(self.job.device).float()


def weighed(x: Tensor, behind: Tensor | None, w: Tensor, w_hat: Tensor, squares: Tensor) -> float:
    """sum(squares * (x w^T - behind w_hat^T)^2) / 2.

    Args:
        x: inputs, float32 [R, K].
        behind: the same as they are rounded; None: they are not.
        w: float32 [N, K].
        w_hat: the same rounded.
        squares: [R, N].
    """
    error = x @ (w - w_hat).T if behind is None else x @ w.T - behind @ w_hat.T
    return float((error.square_() * squares).sum(dtype=torch.float64)) / 2
