"""One transform of a model: asked at every site, block by block, for what it does there.

What it measures is measured on the original model, as the transforms before it left it, in a pass of its own.

Shape letters: S samples, T tokens, n rows of a reader, K its columns.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from qtool.calibrate.walker import Walker
from qtool.checkpoint.edits import STREAM, Edit, model_edges, takes_shifts
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.rewritten import Rewritten
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.plan import LayerPlan
from qtool.stats._base import InputStats
from qtool.transforms._base import Reader, Site, Transform

HEAD_IN = "head_in"
"""What the output layer reads, as `Module.reads`."""


class Rewriting:
    """One transform of a model.

    Args:
        job: the run.
        transform: which one.
        before: what those before it did.
        listener: called with events of progress.

    Attributes:
        notes: what came of it, for the report: nothing that its edits do not say.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, job: Job, transform: Transform, before: Sequence[Edit], listener: Listener) -> None:
        self.job, self.transform, self.listener = job, transform, listener
        self.model = Rewritten(job.original, before, dtype=torch.float32)
        self.plans = {p.module.name: p for p in job.plan.layers}

    def edits(self, tokens: Tensor | None) -> Iterator[Edit]:
        """Everything that it does, in order."""
        if STREAM in self.transform.kinds:
            yield from self.turned()
        if not self.transform.kinds - {STREAM}:
            return
        needs, calibration = self.transform.needs, self.job.plan.recipe.calibration
        walker = hidden = None
        if needs and tokens is not None:
            walker = Walker(self.model, self.job.device, self.job.dtype, calibration.experts == "all", self.job.ranks)
            hidden = walker.embed(tokens[self.job.ranks.share(len(tokens))])
        count = self.model.family.blocks(self.model.config)
        for i in range(count):
            stats: dict[str, InputStats] = {}
            if walker and hidden:
                stats = walker.collect(walker.load_block(i), i, hidden, needs)
            yield from self.at(i, stats)
            self.listener(Event("transform", i + 1, count, self.transform.name()))
        head = self.model.family.head
        if head in self.plans:
            yield from self.at(None, {HEAD_IN: walker.collect_head(hidden, needs)} if walker and hidden else {})

    def turned(self) -> Iterator[Edit]:
        """What it does to hidden states of the whole model."""
        edges = model_edges(self.model)
        stream = next(edge for edge in edges.values() if edge.kind == STREAM)
        if op := self.transform.op(self.site(stream, (), None)):
            yield from (Edit(edge.name) for edge in edges.values() if edge.kind == "norm")
            yield Edit(STREAM, op)

    def at(self, i: int | None, stats: Mapping[str, InputStats]) -> Iterator[Edit]:
        """What it does in block i, or behind the last one (None); `stats` by `Module.reads`.

        Each process finds what to do at some sites.
        """
        ranks = self.job.ranks
        sites = [*self.on_edges(i, stats), *self.in_front(i, stats)]
        found = ranks.gather([self.transform.op(site) for _, _, site in sites[ranks.share(len(sites))]])
        for number, (edge, modules, _) in enumerate(sites):
            if op := found[number % ranks.size][number // ranks.size]:
                yield Edit(edge, op, modules)

    def on_edges(self, i: int | None, stats: Mapping[str, InputStats]) -> Iterator[tuple[str, tuple[str, ...], Site]]:
        """Sites on edges of the graph: the edge, no modules, and the site."""
        for edge in self.model.family.edges(self.model.config, i):
            if self.transform.adds and not takes_shifts(self.model, edge):
                continue
            readers = [self.plans[name] for name in edge.readers if name in self.plans]
            measured = readers or [self.plans[name] for name in edge.source if name in self.plans]
            rounded = any(self.plans[m].format for m in (*edge.source, *edge.readers) if m in self.plans)
            cached = edge.kind == "scores" and self.job.plan.recipe.kv_cache is not None
            if edge.kind in self.transform.kinds - {STREAM} and (rounded or cached):
                whole = next((p for p in measured if p.module.expert is None), measured[0])
                yield edge.name, (), self.site(edge, readers, stats.get(whole.module.reads), stats)

    def in_front(self, i: int | None, stats: Mapping[str, InputStats]) -> Iterator[tuple[str, tuple[str, ...], Site]]:
        """Sites in front of layers: no edge, the layers, and the site."""
        if "input" not in self.transform.kinds:
            return
        inputs: dict[str, list[LayerPlan]] = defaultdict(list)
        for p in self.job.plan.layers:
            if p.format and p.module.block == i and p.module.kind != "embedding":
                inputs[p.module.reads].append(p)
        for reads, plans in inputs.items():
            width = plans[0].module.shape[1]
            found = self.readers(plans, stats)
            site = Site("input", width, width, 1, found, None, stats.get(reads), self.seed(reads))
            yield "", tuple(p.module.name for p in plans), site

    def site(
        self,
        edge: Edge,
        readers: Sequence[LayerPlan],
        stats: InputStats | None,
        each: Mapping[str, InputStats] | None = None,
    ) -> Site:
        """An edge as transforms see it; `each` has the statistics of single readers, by `Module.reads`."""
        source = bias = None
        if edge.kind in ("heads", "product", "scores"):
            rows = slice(edge.first, edge.first + edge.width)
            source = partial(self.weight, edge.source[0], rows)
            if (name := f"{edge.source[0]}.bias") in self.model.names():
                bias = partial(self.tensor, name, rows)
        seed = self.seed(edge.name)
        found = self.readers(readers, each or {})
        return Site(edge.kind, edge.width, edge.dim, edge.repeat, found, source, stats, seed, edge.rotary, bias)

    def readers(self, plans: Sequence[LayerPlan], stats: Mapping[str, InputStats]) -> tuple[Reader, ...]:
        """Layers that are quantized, as transforms see them."""
        return tuple(
            Reader(
                partial(self.weight, p.module.name),
                partial(rounded, p),
                p.activations is not None,
                stats.get(p.module.reads),
            )
            for p in plans
            if p.format
        )

    def weight(self, module: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a weight, float32, as the transforms before this one left it."""
        shared = module == self.model.family.head and self.model.tied
        name = self.model.family.embedding if shared else module
        return self.tensor(f"{name}.weight", rows)

    def tensor(self, name: str, rows: slice) -> Tensor:
        """Rows of a tensor, float32, as the transforms before this one left it."""
        return self.model.tensor(name).float()[rows]

    def seed(self, name: str) -> int:
        """For random choices at a place of that name."""
        text = f"{self.job.plan.recipe.calibration.seed} {name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def rounded(plan: LayerPlan, w: Tensor, importance: Tensor | None) -> Tensor:
    """What plain rounding makes of some rows of a layer, [n, K]; by importance where its method measures inputs."""
    assert plan.format is not None
    assert plan.method is not None
    fmt = plan.format.with_largest(float(w.abs().max())) if plan.format.needs_largest else plan.format
    importance = importance if plan.method.needs else None
    params = fmt.fit(w, importance)
    return fmt.decode(fmt.snap(w, params, importance), params)
