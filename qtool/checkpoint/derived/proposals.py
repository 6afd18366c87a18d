"""Edges that a derived model may have, as inputs, sizes and the order of its layers suggest.

Norms and what reads them are seen in the pass that is watched. What lies between two layers is not: wherever sizes
allow it, one is proposed as the source of the other. What holds is found out by trying.

Shape letters: C channels of an edge, N rows and K columns of a matrix.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.derived.heads import heads_of, rotary_dims, text_fields
from qtool.checkpoint.families._edges import Edge, query_and_key
from qtool.checkpoint.families._parts import Linear

Pattern = tuple[object, ...]
"""What edges of blocks of one kind have in common."""


def proposals(facts: Facts, config: Mapping[str, Any], i: int | None) -> list[Edge]:
    """Edges of block i, or around all blocks (None), that may hold; several where one may hold.

    Args:
        facts: of the class.
        config: config.json.
        i: the block.
    """
    width = facts.shapes[f"{facts.embedding}.weight"][1]
    if i is None:
        norm = [] if facts.last_norm is None else [(facts.last_norm, (facts.head,))]
        stream = Edge("stream", (facts.embedding,), (facts.head,), width, dim=width)
        return [*norm_edges(facts, norm), stream]
    prefix, linears = facts.block_prefix.format(i=i), facts.linears[i]
    norms = [(prefix + norm, tuple(prefix + path for path in readers)) for norm, readers in facts.norms[i]]
    edges = [*norm_edges(facts, norms), *score_edges(facts, config, prefix, linears)]
    alike: dict[int | None, list[Linear]] = defaultdict(list)
    for reader in linears:
        if reader.kind != "router":
            for source in (before := alike[reader.expert]):
                edges += between(facts, config, prefix, source, reader, before)
            before.append(reader)
    behind = {path for _, readers in norms for path in readers}
    seen = [readers for norm, readers in norms if facts.shapes[f"{norm}.weight"] == (width,)]
    readers = tuple(path for own in seen for path in own)
    written = [prefix + x.path for x in linears if prefix + x.path not in behind]
    writers = tuple(path for path in written if facts.shapes[f"{path}.weight"][0] == width)
    return edges + ([Edge("stream", writers, readers, width, dim=width)] if writers and readers else [])


def norm_edges(facts: Facts, norms: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[Edge]:
    """From norms to their readers, whether they add one to their weight or not."""
    for norm, readers in norms:
        for offset in (0.0, 1.0):
            yield Edge("norm", (norm,), readers, facts.shapes[f"{norm}.weight"][0], offset=offset)


def score_edges(facts: Facts, config: Mapping[str, Any], prefix: str, linears: Sequence[Linear]) -> Iterator[Edge]:
    """From keys to queries."""
    heads, kv_heads, dim = heads_of(config, facts.shapes[f"{facts.embedding}.weight"][1])
    found = {x.role: prefix + x.path for x in linears if x.expert is None}
    if (ends := query_and_key(found, heads * dim)) is None:
        return
    q, k, first = ends
    if facts.shapes[f"{k}.weight"][0] - first in (kv_heads * dim, 2 * kv_heads * dim):
        for rotary in rotary_dims(config, dim):
            repeat = heads // kv_heads
            yield Edge("scores", (k,), (), kv_heads * dim, first, repeat, dim, beside=(q,), rotary=rotary)


def between(
    facts: Facts, config: Mapping[str, Any], prefix: str, source: Linear, reader: Linear, before: Sequence[Linear]
) -> Iterator[Edge]:
    """From one layer to another: through attention, or a product.

    Args:
        facts: of the class.
        config: config.json.
        prefix: of names in the block.
        source: writes the channels.
        reader: reads them.
        before: layers that run before it, as often.
    """
    heads, kv_heads, dim = heads_of(config, facts.shapes[f"{facts.embedding}.weight"][1])
    n, k = (facts.shapes[f"{prefix}{x.path}.weight"][side] for side, x in enumerate((source, reader)))
    ends = (prefix + source.path,), (prefix + reader.path,)
    values = kv_heads * dim
    if k == heads * dim and n in (values, k + 2 * values):
        yield Edge("heads", *ends, values, n - values, heads // kv_heads, dim)
    if n == k:
        gates = [x for x in before if x is not source and facts.shapes[f"{prefix}{x.path}.weight"][0] == k]
        for gate in gates:
            yield Edge("product", *ends, k, beside=(prefix + gate.path,))
        yield Edge("product", *ends, k)
    elif n == 2 * k:
        yield Edge("product", *ends, k, k, beside=ends[0])


def pattern(edge: Edge) -> Pattern:
    """What it is, in no particular block and for no particular expert."""
    names = (tuple(dict.fromkeys(map(anywhere, part))) for part in (edge.source, edge.readers, edge.beside))
    turned = edge.rotary / edge.dim
    return (edge.kind, *names, edge.offset, turned, edge.first > 0)


def anywhere(path: str) -> str:
    """A path without its numbers."""
    return re.sub(r"\.\d+\.", ".*.", path)


def kind_of(facts: Facts, config: Mapping[str, Any], i: int) -> object:
    """What blocks of one kind have in common: tensors, layers, and what config.json lists for them."""
    prefix, fields = facts.block_prefix.format(i=i), text_fields(config).items()
    tensors = {anywhere(name) for name in facts.shapes if name.startswith(prefix)}
    layers = {(anywhere(f".{x.path}."), x.role, x.kind) for x in facts.linears[i]}
    listed = [str(x[i]) for _, x in fields if isinstance(x, list) and len(x) == len(facts.linears)]
    return frozenset(tensors), frozenset(layers), tuple(listed)
