"""The graph of a derived model: of the edges that are proposed those that hold.

Each is tried on a small random model of the kind in float64, and kept only where rewriting along it by random factors
leaves every logit what it was. Hidden states are turned by a random orthogonal matrix, in the whole model at once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.derived.derive import derive
from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.derived.miniature import Miniature, smaller
from qtool.checkpoint.derived.proposals import Pattern, kind_of, pattern, proposals
from qtool.checkpoint.edits import STREAM, Edit
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import QtoolError
from qtool.ops._base import InputOp
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.permutation import Permutation
from qtool.ops.scale import Scale

MOST_BLOCKS = 16
"""Of the small model."""
ALIKE = 1e-8
"""Largest difference of logits, in their standard deviations."""


def proven_edges(facts: Facts, config: Mapping[str, Any], i: int | None) -> tuple[Edge, ...]:
    """See `Family.edges`: proposals that hold in every block of that kind of a small model.

    Args:
        facts: of the class.
        config: config.json.
        i: the block; None: what is around all of them.
    """
    held = held_patterns(json.dumps(dict(config), sort_keys=True))
    found = held.get(None if i is None else kind_of(facts, config, i), {})
    edges, taken = list[Edge](), set[object]()
    for edge in proposals(facts, config, i):
        key = (edge.kind, edge.readers) if edge.kind in ("heads", "product") else edge.name
        if pattern(edge) in found and key not in taken:
            taken.add(key)
            edges.append(replace(edge, shifts=found[pattern(edge)]))
    return tuple(edges)


@lru_cache(maxsize=16)
def held_patterns(text: str) -> Mapping[object, Mapping[Pattern, bool]]:
    """Kind of a block, or None -> patterns that hold there, and whether what is added to channels goes through.

    Args:
        text: config.json.
    """
    config = json.loads(text)
    facts = derive(config)
    firsts: dict[object, int] = {}
    for i in range(len(facts.linears)):
        firsts.setdefault(kind_of(facts, config, i), i)
    count = min(max(2, *(i + 1 for i in firsts.values())), MOST_BLOCKS, len(facts.linears))
    for small in smaller(config, facts, count):
        try:
            return Trial(Miniature(small)).held()
        except (QtoolError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # sizes that do not go together in this class
    return {}


class Trial:
    """Tries edges on a small model.

    Args:
        model: the model.
    """

    def __init__(self, model: Miniature) -> None:
        self.model, self.facts = model, model.facts
        self.draw = torch.Generator().manual_seed(0)

    def held(self) -> Mapping[object, Mapping[Pattern, bool]]:
        """See `held_patterns`."""
        found: dict[object, dict[Pattern, bool]] = {}
        norms: dict[int | None, list[Edge]] = {}
        streams: dict[int | None, list[Edge]] = {}
        for i in (*range(len(self.facts.linears)), None):
            kind = None if i is None else kind_of(self.facts, self.model.config, i)
            groups: dict[Pattern, list[Edge]] = defaultdict(list)
            for edge in proposals(self.facts, self.model.config, i):
                groups[pattern(edge)].append(edge)
            streams[i] = [edge for group in groups.values() for edge in group if edge.kind == "stream"]
            own = {key: self.shifts(i, group[0]) for key, group in groups.items() if self.holds(i, group)}
            norms[i] = [edge for key in own for edge in groups[key] if edge.kind == "norm"]
            before = found.get(kind, own)
            found[kind] = {key: shifts and own[key] for key, shifts in before.items() if key in own}
        if self.turns(norms, streams):
            for i, edges in streams.items():
                kind = None if i is None else kind_of(self.facts, self.model.config, i)
                found[kind] |= dict.fromkeys(map(pattern, edges), False)
        return found

    def holds(self, i: int | None, edges: Sequence[Edge]) -> bool:
        """Whether logits stay the same when all of these are rewritten along."""
        kind = edges[0].kind
        if kind == "stream":
            return False
        trials = [[Edit(edge.name, self.factors(edge)) for edge in edges]]
        if kind == "heads":
            trials.append([Edit(edge.name, self.turn(edge.width, edge.dim)) for edge in edges])
        if kind == "product":
            trials.append([Edit(edge.name, self.order(edge.width)) for edge in edges])
        return all(self.same({i: edges}, edits) for edits in trials)

    def shifts(self, i: int | None, edge: Edge) -> bool:
        """Whether what is added to all values of a channel arrives at the readers as it is."""
        if edge.kind != "heads":
            return False
        added = torch.randn(edge.width, generator=self.draw, dtype=torch.float64)
        columns = added.view(-1, 1, edge.dim).expand(-1, edge.repeat, -1).reshape(-1)
        source, reader = (self.module(i, path) for path in (edge.source[0], edge.readers[0]))
        arrived = torch.nn.functional.linear(columns, reader.weight)

        def add(_: object, __: object, y: Tensor) -> Tensor:
            y[..., edge.first : edge.first + edge.width] += added
            return y

        hooks = (
            source.register_forward_hook(add),
            reader.register_forward_hook(lambda _, __, y: y - arrived),
        )
        try:
            return self.alike(self.model.run())
        finally:
            for hook in hooks:
                hook.remove()

    def module(self, i: int | None, path: str) -> Any:
        """The module of the class that a layer of block i is."""
        below = path.removeprefix(self.facts.block_prefix.format(i=i))
        return self.model.model.get_submodule(f"{self.facts.blocks_path}.{i}.{self.facts.paths.get(below, below)}")

    def turns(self, norms: Mapping[int | None, list[Edge]], streams: Mapping[int | None, list[Edge]]) -> bool:
        """Whether hidden states of the whole model can be turned."""
        edges = {i: [*norms[i], *streams[i]] for i in norms}
        if self.facts.streams.count or not all(streams.values()):
            return False
        width = next(iter(streams.values()))[0].width
        folds = [Edit(edge.name) for own in norms.values() for edge in own]
        return self.same(edges, [*folds, Edit(STREAM, self.turn(width, width))])

    def same(self, edges: Mapping[int | None, Sequence[Edge]], edits: Sequence[Edit]) -> bool:
        """Whether logits are what they were behind some edits."""
        self.model.proposed.on_trial = {i: list(own) for i, own in edges.items()}
        touched = {m for own in edges.values() for e in own for m in (*e.source, *e.readers, *e.beside)}
        names = [f"{module}.{kind}" for module in sorted(touched) for kind in ("weight", "bias")]
        try:
            model = Rewritten(self.model, edits, dtype=torch.float64)
            tensors = {name: model.tensor(name) for name in names if name in self.model.views}
        except (QtoolError, RuntimeError):  # sizes that do not fit
            return False
        return self.alike(self.model.with_tensors(tensors))

    def alike(self, logits: Tensor) -> bool:
        """Whether logits are what they were."""
        wanted = self.model.logits
        return bool((logits - wanted).abs().max() < ALIKE * wanted.std())

    def factors(self, edge: Edge) -> InputOp:
        """Factors that show whatever is not linear; of scores alike where channels are rotated into each other."""
        sizes = torch.exp2(8 * torch.rand(edge.width, generator=self.draw, dtype=torch.float64) - 4)
        signs = torch.randint(2, (edge.width,), generator=self.draw) * 2 - 1
        factors = sizes * signs
        if edge.kind == "scores":
            heads, half = factors.view(-1, edge.dim), edge.rotary // 2
            heads[:, half : edge.rotary] = heads[:, :half]
        return Scale(factors)

    def order(self, width: int) -> InputOp:
        """Another order."""
        return Permutation(torch.randperm(width, generator=self.draw))

    def turn(self, width: int, dim: int) -> InputOp:
        """Random orthogonal matrices."""
        drawn = torch.randn(width // dim, dim, dim, generator=self.draw, dtype=torch.float64)
        return Orthogonal(torch.linalg.qr(drawn).Q)
