"""Gate and up as layers of their own, where a class keeps their rows in one matrix, gate's first.

Shape letters: F rows of gate, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.families._parts import Linear, Slice

ROLES = ("gate", "up")


def halved(facts: Facts) -> Facts:
    """Facts in which no layer is gate and up at once."""
    paths, slices = dict(facts.paths), dict(facts.slices)
    shapes: dict[str, tuple[int, ...]] = {}
    both = {
        facts.block_prefix.format(i=i) + x.path: x
        for i, linears in enumerate(facts.linears)
        for x in linears
        if x.role == "gate_up"
    }
    for name, shape in facts.shapes.items():
        if (linear := both.get(name.removesuffix(".weight"))) is None:
            shapes[name] = shape
            continue
        rows, place = shape[0] // 2, facts.paths.get(linear.path, linear.path)
        before = name.removesuffix(f"{linear.path}.weight")
        for i, half in enumerate(halves(linear)):
            own = f"{before}{half.path}.weight"
            shapes[own] = (rows, *shape[1:])
            slices[own] = Slice(name, shape, first=i * rows)
            paths[half.path] = f"{place}.{half.path.rpartition('.')[2]}"
            paths[f"{half.path}.weight"] = f"{paths[half.path]}.weight"
    linears = tuple(tuple(half for x in own for half in halves(x)) for own in facts.linears)
    known = {x.path: tuple(half.path for half in halves(x)) for own in facts.linears for x in own}
    norms = tuple(
        tuple((norm, tuple(half for path in readers for half in known.get(path, (path,)))) for norm, readers in own)
        for own in facts.norms
    )
    return replace(facts, shapes=shapes, linears=linears, paths=paths, slices=slices, norms=norms, separate=False)


def halves(linear: Linear) -> Iterator[Linear]:
    """Gate and up of a layer that is both; any other layer itself."""
    if linear.role != "gate_up":
        yield linear
        return
    owner = linear.path.rpartition(".")[0]
    before = f"{owner}." if owner else ""
    for role in ROLES:
        yield replace(linear, path=f"{before}{role}_proj", role=role, fused=f"{before}gate_up")
