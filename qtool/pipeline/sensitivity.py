"""What every layer would cost in every format that a budget allows: the loss of rounding it, from one calibration.

Rows of a candidate's matrix are rounded for real, with importances of its inputs, and the error is looked at where it
matters: mean over tokens of half the squared gradient of each output times its squared error, nats per token. Some rows
of a large matrix stand for all, the more likely the more their outputs matter; they are the same for all candidates.

Codes that GPTQ is to choose are chosen by it, for the inputs at hand, and cost as much as they are expected to on other
tokens (`by_method`). What that leaves of the errors of rounding is kept, so that plans can be tried rounded.

Shape letters: S samples, T tokens of one, R tokens that a module reads, K inputs, N outputs, M rows that stand for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from qtool.allocate.decisions import Decision
from qtool.allocate.losses import LOSSES, Rounding
from qtool.allocate.sampling import Sample, systematic
from qtool.allocate.slopes import LayerRecord, Slopes
from qtool.calibrate.inputs import rounded
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Layer, Module
from qtool.methods.rtn import RTN
from qtool.pipeline.by_method import optimism, solved, solver
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.roughly import Corrections, Nearest, Shares, Statics, with_found
from qtool.pipeline.rows import row_parts
from qtool.pipeline.solver import with_static
from qtool.plan import LayerPlan
from qtool.residuals._base import Tensors
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.gram import Gram, gram_of
from qtool.stats.values import Values

ROWS = 256
"""Rows that stand for all of a larger matrix."""


@dataclass
class Priced:
    """What one calibration says about all plans.

    Attributes:
        costs: nats per token, by module and by the label of its plan.
        importance: mean square of each input channel, float32 [K], by `Module.reads`.
        statics: what inputs are rounded with.
        corrections: what is kept beside codes.
        shares: by what factor errors of rounding to nearest change in a method's hands, by module and label; 1 where
            nothing is said.
    """

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    statics: Statics = field(default_factory=dict)
    corrections: dict[str, dict[str, list[Tensors]]] = field(default_factory=dict)
    shares: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def known(self) -> tuple[Mapping[str, Tensor], Statics, Corrections, Shares]:
        """What `Roughly` takes."""
        return self.importance, self.statics, self.corrections, self.shares


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
        assert job.plan.recipe.budget is not None
        self.loss, self.own = LOSSES[job.plan.recipe.budget.scores], job.plan.recipe.budget.scores == "second-order"
        self.walker = Walker(job.checkpoint, job.device, job.dtype, everything)
        self.latest: tuple[object, InputStats] = None, InputStats(0, frozenset())

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
                    self.inside(m, seen.pop(m.name))
            listener(Event("allocate", done, blocks, f"block {i}"))
        for name, plans in self.options.items():
            module = next(iter(plans.values())).module
            if module.block is None:
                self.outside(module, slopes)
            else:
                self.unseen(name)
        return self.found

    def inside(self, module: Module, seen: LayerRecord) -> None:
        """Prices a linear layer of a block."""
        stats = self.measure(module, seen.x)
        matters = seen.x.float().square().sum(1) @ seen.squares.float()
        sample, w = self.sampled(module, matters)
        here = LayerRecord(seen.x, seen.squares[:, sample.rows.to(seen.squares.device)])
        self.price(module.name, len(seen.x), partial(self.inner, seen=here, stats=stats, sample=sample, w=w))

    def outside(self, module: Module, slopes: Slopes) -> None:
        """Prices the token embedding or the output layer."""
        embeds = module.kind == "embedding"
        heads = not embeds or self.job.checkpoint.tied
        asked = not embeds or any(p.weight_needs for p in self.options[module.name].values())
        read = self.measure(module, slopes.head.inputs()) if asked else None
        sample, w = self.sampled(module, self.matter(slopes, embeds, heads))
        head = slopes.head.seen(sample.rows) if heads else None
        self.price(
            module.name,
            self.tokens.numel(),
            partial(self.outer, head=head, slopes=slopes, stats=read, sample=sample, w=w),
        )

    def measure(self, module: Module, x: Tensor) -> InputStats:
        """Statistics of what a module reads, [R, K]; one after the other that read the same share them."""
        plans = self.options[module.name].values()
        rounding = {p.activations.label: p for p in plans if p.activations}
        static = {label: p for label, p in rounding.items() if p.activations and p.activations.static}
        needs = {need for p in plans for r in p.residuals for need in r.needs} | {Channels}
        needs |= ({Values} if static else set()) | ({Gram} if self.own and any(map(solver, plans)) else set())
        key = module.reads, module.expert, needs
        if key != self.latest[0]:
            self.latest = key, InputStats(x.shape[1], frozenset(needs), self.job.device)
            self.latest[1].add(x)
        stats = self.latest[1]
        self.found.importance[module.reads] = stats[Channels].importance.cpu()
        for label, p in static.items():
            if (found := with_static(p, stats).static) is not None:
                self.found.statics.setdefault(module.name, {})[label] = found
        return stats

    def price(self, name: str, reads: int, cost: Callable[[LayerPlan], float]) -> None:
        """Notes what the options of a module, which reads so many tokens, cost."""
        own: dict[str, float] = {}
        for label, p in self.options[name].items():
            rounded = replace(p, method=RTN()) if solver(p) else p
            by_method = self.own and rounded is not p and reads >= self.job.plan.recipe.calibration.min_tokens
            own[label] = cost(p if by_method else rounded) / self.tokens.numel() if p.format else 0.0
            if by_method and (nearest := cost(rounded) / self.tokens.numel()):
                self.found.shares.setdefault(name, {})[label] = math.sqrt(own[label] / nearest)
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

    def inner(self, plan: LayerPlan, seen: LayerRecord, stats: InputStats, sample: Sample, w: Tensor) -> float:
        """What rounding a linear layer costs, summed over tokens.

        Args:
            plan: with the candidate.
            seen: what it reads, and squares of the outputs of the sample.
            stats: of what it reads.
            sample: its rows.
            w: of its matrix, float32 [M, K].
        """
        w, w_hat = self.candidate(plan, sample, w, stats)
        behind = self.behind(seen.x, with_found(plan, self.found.statics))
        return self.loss(Rounding(seen.x, behind, w, w_hat, seen.squares, sample.weights)) * optimism(plan, stats)

    def outer(
        self,
        plan: LayerPlan,
        head: LayerRecord | None,
        slopes: Slopes,
        stats: InputStats | None,
        sample: Sample,
        w: Tensor,
    ) -> float:
        """The same of the token embedding, of the output layer, or of both where they share a matrix.

        Args:
            plan: with the candidate.
            head: what the output layer reads, and squares of the logits of the sample; None: it has its own matrix.
            slopes: through with all blocks.
            stats: of what is read; None: tokens look rows up.
            sample: its rows.
            w: of the matrix, float32 [M, K].
        """
        w, w_hat = self.candidate(plan, sample, w, stats)
        total = 0.0
        if head is not None:
            behind = self.behind(head.x, with_found(plan, self.found.statics))
            loss = self.loss(Rounding(head.x, behind, w, w_hat, head.squares, sample.weights))
            total += loss if stats is None else loss * optimism(plan, stats)
        if plan.module.kind == "embedding":
            total += float(self.looked_up(w - w_hat, sample, slopes) @ sample.weights)
        return total

    def candidate(self, plan: LayerPlan, sample: Sample, w: Tensor, stats: InputStats | None) -> tuple[Tensor, Tensor]:
        """The sample of a matrix, and the same rounded, both float32 [M, K].

        What runs beside the codes on inputs as they were is no part of either: it takes as much from what is missing
        as from what would have to be rounded.
        """
        nearest, importance = Nearest(self.job, plan), None if stats is None else stats[Channels].importance
        if solver(plan) and stats is not None and not nearest.same:
            return w, solved(plan, nearest.format, w, stats)
        if nearest.format.by_rows and not plan.residuals:
            return w, nearest(w, importance)
        whole, rows = self.job.checkpoint.tensor(f"{plan.module.name}.weight"), sample.rows.to(w.device)
        if not plan.residuals:
            return w, nearest(whole, importance)[rows]
        w_hat, found = nearest.corrected(whole, importance, gram_of(stats))
        kept: list[Tensors] = [{name: t.cpu() for name, t in c.tensors.items()} for c in found]
        self.found.corrections.setdefault(plan.module.name, {})[plan.label] = kept
        rest = torch.zeros_like(w_hat)
        for correction in found:
            if correction.residual.apart:
                rest = correction.apply(rest)
            else:
                w_hat = correction.apply(w_hat)
        return w - rest[rows], w_hat[rows]

    def looked_up(self, error: Tensor, sample: Sample, slopes: Slopes) -> Tensor:
        """Of rows of the embedding that tokens look up, [M, K]: float64 [M]."""
        assert slopes.embedded is not None
        checkpoint, device = self.job.checkpoint, slopes.embedded.device
        place = torch.full((len(slopes.head.care),), -1)
        place[sample.rows] = torch.arange(len(sample.rows))
        here = place[self.tokens] >= 0
        rows = place[self.tokens[here]]
        errors = error.to(device)[rows.to(device)] * checkpoint.family.embedding_scale(checkpoint.config)
        found = (errors.square_() * slopes.embedded[here.to(device)].to(errors)).sum(1).double().cpu() / 2
        return torch.zeros(len(error), dtype=torch.float64).index_add_(0, rows, found)

    def matter(self, slopes: Slopes, embeds: bool, heads: bool) -> Tensor:
        """How much rows of the embedding or of the output layer matter, whatever their errors: float32 [V].

        Args:
            slopes: through with all blocks.
            embeds: whether tokens look them up.
            heads: whether they make logits.
        """
        matters = slopes.head.care.cpu() * float(heads)
        if embeds:
            assert slopes.embedded is not None
            scale = self.job.checkpoint.family.embedding_scale(self.job.checkpoint.config)
            felt = slopes.embedded.float().sum(2).cpu() * scale**2
            matters = matters.index_add(0, self.tokens.flatten(), felt.flatten())
        return matters

    def behind(self, x: Tensor, layer: Layer) -> Tensor | None:
        """Inputs, [R, K], as a runtime rounds them; None: it does not."""
        return rounded(x, layer) if layer.activations else None

    def sampled(self, module: Module, matters: Tensor) -> tuple[Sample, Tensor]:
        """Rows that stand for all of a matrix, float32 [M, K], by how much outputs matter, [N], and rows' squares."""
        name, sizes = f"{module.name}.weight", torch.empty(module.shape[0])
        for a, b in row_parts(module.shape):
            sizes[a:b] = self.job.checkpoint.rows(name, a, b).float().square().sum(1) * matters[a:b].cpu()
        sample = systematic(sizes, ROWS)
        parts = []
        for a, b in row_parts(module.shape):
            here = sample.rows[(sample.rows >= a) & (sample.rows < b)]
            if len(here):
                parts.append(self.job.checkpoint.rows(name, a, b)[here - a])
        w = torch.cat(parts) if parts else torch.zeros(0, module.shape[1])
        return sample, w.to(self.job.device).float()
