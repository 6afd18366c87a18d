"""Scales of channels go from a layer that reads them into the one that writes them, whose scales are there anyway.

    min over c and codes of | (W - Q diag(c)) X |^2

W is the reader as it was (down; o), Q what its codes decode to, X what it reads in the quantized model. c and Q take
turns: given Q, c solves the linear equations ((Q^T Q) o H) c = diag(Q^T W H), H = X X^T; given c, a method chooses the
codes of W diag(1/c) again, for inputs diag(c) X. Then rows of the layer that writes the channels (up; v) are multiplied
by c, which is exact where their scales are fine enough. After D2Quant (https://arxiv.org/abs/2602.02546), which does so
for down; o reads a channel of v with several heads, and these share its c.

Pairs whose error is not less stay as they were; everything does if the predictions of the whole model are not nearer to
the original's on samples that nothing was solved for. GPTQ's own correction of drift is lost where codes are chosen
again, so behind it that may well be.

Shape letters: N rows, K columns of the reader, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.checkpoint.families._edges import Edge
from qtool.formats._base import Params, Quantized
from qtool.methods._base import Method, split
from qtool.methods._block import MatrixMethod
from qtool.plan.layers import LayerPlan, Plan
from qtool.stages._base import Stage, StageResult, StageTask
from qtool.stages._student import Student, Teacher
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram
from qtool.store.overlay import CODES, Overlaid

NEAR = 0.01
"""How strongly factors are held near to 1, relative to the curvature of each."""
LARGEST = 4.0
"""Factors are between this and its inverse."""
FINE = 0.005
"""How far the scales of a writer may be from what they shall be, relatively, in the mean."""


@dataclass(frozen=True)
class Pair:
    """What was found along an edge.

    Attributes:
        params: of both matrices, by module.
        weight: what stands for the reader while its inputs are as they were, float32 [N, K].
        left: share of the error that is left.
    """

    params: dict[str, Params]
    weight: Tensor
    left: float


class Absorb(Stage):
    """Moves scales of channels from readers into writers.

    Attributes:
        turns: how often factors are solved for; codes of the reader are chosen again between.
        method: chooses them, by Gram matrices alone.
        holdout: share of the samples that only decide whether anything changes.
    """

    turns: int = Field(2, ge=1, le=20)
    method: MatrixMethod = Field({"gptq": {"drift": 0}}, validate_default=True)
    holdout: float = Field(0.125, gt=0, lt=1)

    def misfit(self, plan: Plan) -> str | None:
        """See `Stage.misfit`."""
        return None if self.method.needs == {Gram} else "it goes by Gram matrices alone: method: {gptq: {drift: 0}}"

    def run(self, task: StageTask) -> StageResult:
        """See `Stage.run`."""
        assert task.tokens is not None  # see `needs_tokens`
        seen, unseen = split(len(task.tokens), self.holdout, task.seed)
        walker, params, left = task.walker(task.model), dict[str, Params](), list[float]()
        hidden = walker.embed(task.tokens[seen])
        for i in range(len(walker.blocks)):
            for pair in self.block(task, walker, i, hidden):
                params |= {module: {**params.get(module, {}), **own} for module, own in pair.params.items()}
                left.append(pair.left)
            task.progress(i + 1, len(walker.blocks), "")
        behind = replace(task, model=Overlaid(task.model, on_cpu(params), {}, self.name()), tokens=task.tokens[unseen])
        after, before = (divergence(t) for t in (behind, replace(behind, model=task.model)))
        about = {"pairs": float(len(left)), "error left": sum(left) / max(len(left), 1)}
        about |= {"held out before": before, "held out": min(after, before)}
        return StageResult(params if after < before else {}, about=about)

    def block(self, task: StageTask, walker: Walker, i: int, hidden: Hidden) -> Iterator[Pair]:
        """What is found in block i; hidden states go on behind it."""
        plans = {p.module.name: p for p in task.layers if p.module.block == i}
        found = task.unrounded.family.edges(task.unrounded.config, i)
        edges = {e.readers[0]: e for e in found if e.kind in ("heads", "product") and free(task, e, plans)}
        readers = {plans[name].module.reads: plans[name].module for name in edges}
        block = walker.load_block(i)
        with walker.quantized_inputs(block, i):
            for step in walker.steps(block, i, hidden, dict.fromkeys(readers, frozenset({Gram}))):
                for reads in (reads for reads, stats in step.items() if stats.tokens):
                    pair = self.pair(task, edges[readers[reads].name], step[reads])
                    if pair:
                        linear = walker.linear(block, readers[reads])
                        linear.weight.data = pair.weight.to(task.device, task.dtype)
                        yield pair

    def pair(self, task: StageTask, edge: Edge, stats: InputStats) -> Pair | None:
        """What is won along an edge; None: nothing.

        Args:
            task: whose matrices.
            edge: of kind heads or product.
            stats: of what the reader reads.
        """
        (source,), (reader,), h = edge.source, edge.readers, stats[Gram].matrix
        w = task.unrounded.tensor(f"{reader}.weight").to(h.device, torch.float32)
        quantized, writer = (task.model.matrix(name).to(h.device).quantized for name in (reader, source))
        channel = columns(edge).to(h.device)
        start = error_of(w, quantized.decode(), h)
        best, chosen = start, None
        for turn in range(self.turns):
            q = quantized.decode()
            c = factors(w, q, h, channel, edge.width)
            if (error := error_of(w, q * c[channel], h)) < best:
                best, chosen = error, (quantized, c)
            if turn + 1 < self.turns:
                quantized = choose(self.method, w, c[channel], h, quantized)
        if chosen is None or not start:
            return None
        quantized, c = chosen
        moved = multiplied(writer, edge, c)
        if moved is None:
            return None
        own = {**quantized.params, CODES: quantized.codes}
        return Pair({source: moved, reader: own}, quantized.decode() * c[channel], best / start)


def on_cpu(params: dict[str, Params]) -> dict[str, Params]:
    """The same where checkpoints keep it."""
    return {module: {name: t.cpu() for name, t in own.items()} for module, own in params.items()}


def divergence(task: StageTask) -> float:
    """Mean KL divergence of a task's model from the original on its tokens, nats per token."""
    assert task.tokens is not None
    teacher = Teacher(task.walker(task.original), task.tokens)
    return Student(task, teacher, scales=False, norms=False).divergence(torch.arange(len(task.tokens)))


def free(task: StageTask, edge: Edge, plans: dict[str, LayerPlan]) -> bool:
    """Whether scales can go along an edge: both ends are quantized, and nothing else depends on these channels."""
    ends = (*edge.source, *edge.readers)
    if len(ends) != 2 or any(name not in plans for name in ends) or f"{ends[0]}.bias" in task.model:
        return False
    if edge.kind == "heads" and task.model.cache:
        return False
    layers = [task.model.layers[name] for name in ends]
    if layers[1].activations or layers[1].input_ops or any(layer.residuals for layer in layers):
        return False
    return layers[0].format.group_rows == 1 and layers[1].format.codebook() is None


def columns(edge: Edge) -> Tensor:
    """The channel that each column of the reader reads, int64 [K]."""
    runs = torch.arange(edge.width).view(-1, 1, edge.width if edge.repeat == 1 else edge.dim)
    return runs.expand(-1, edge.repeat, -1).reshape(-1)


def error_of(w: Tensor, q: Tensor, h: Tensor) -> float:
    """|(W - Q) X|^2, of [N, K] matrices and the inputs' Gram matrix [K, K]."""
    return float((((w - q) @ h) * (w - q)).double().sum())


def factors(w: Tensor, q: Tensor, h: Tensor, channel: Tensor, count: int) -> Tensor:
    """The best factor of each channel, float32 [C]; ones where the equations cannot be solved.

    Args:
        w: the reader, float32 [N, K].
        q: what its codes decode to, [N, K].
        h: the inputs' Gram matrix, [K, K].
        channel: of each column, int64 [K].
        count: C.
    """
    curvature, slope = (q.T @ q).double() * h, (q * (w @ h)).double().sum(0)
    a = slope.new_zeros(count, len(slope)).index_add_(0, channel, curvature)
    a = slope.new_zeros(count, count).index_add_(1, channel, a)
    b = slope.new_zeros(count).index_add_(0, channel, slope)
    near = NEAR * a.diagonal().clamp_min(float(a.diagonal().mean()) * 1e-6 + 1e-30)
    lower, info = torch.linalg.cholesky_ex(a + near.diag())
    if int(info):
        return torch.ones_like(b).float()
    found = torch.cholesky_solve((b + near)[:, None], lower)[:, 0]
    return found.clamp(1 / LARGEST, LARGEST).float()


def choose(method: Method, w: Tensor, c: Tensor, h: Tensor, before: Quantized) -> Quantized:
    """Codes of W diag(1/c) for inputs diag(c) X; c is that of each column, [K]."""
    stats, scaled = InputStats(len(c), method.needs, h.device), w / c
    stats[Gram].matrix = h * c * c[:, None]
    fmt = before.format
    fmt = fmt.with_largest(float(scaled.abs().max())) if fmt.needs_largest else fmt
    return method.solve(scaled, stats, fmt).quantized


def multiplied(writer: Quantized, edge: Edge, c: Tensor) -> Params | None:
    """Parameters of the layer that writes channels, its rows times c; None: its scales are too coarse for that."""
    rows = torch.ones(len(writer.codes), device=c.device)
    rows[edge.first : edge.first + edge.width] = c
    return scaled(writer, rows)


def scaled(matrix: Quantized, rows: Tensor) -> Params | None:
    """Parameters of a matrix whose rows are multiplied by factors [N]; None: its scales are too coarse for that."""
    fmt, factor = matrix.format, rows[:, None]
    scale, offset = fmt.affine(matrix.params)
    params = fmt.refit(matrix.params, scale * factor, offset * factor)
    found = fmt.affine(params)[0]
    off = (found - scale * factor).abs().sum() / (scale * factor).abs().sum().clamp_min(torch.finfo().tiny)
    return params if float(off) < FINE else None
