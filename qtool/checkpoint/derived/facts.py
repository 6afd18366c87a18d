"""What is known of a model that has no family file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qtool.checkpoint.derived.chain import Streams
from qtool.checkpoint.families._parts import Linear, Slice


@dataclass(frozen=True)
class Facts:
    """What `Derived` tells of a model.

    Attributes:
        architecture: the class.
        blocks_path: where its blocks are, in the class.
        block_prefix: what names of tensors of block i begin with in checkpoints, with "{i}".
        embedding, head: modules, as checkpoints call them.
        head_bias: tensor that the output layer adds; None: none.
        streams: see `Streams`.
        shapes: of every tensor.
        linears: of every block, in the order of computation.
        paths: what the class calls a module or tensor below its block; those that checkpoints call the same are left
            out.
        around: tensor outside of blocks that a text needs -> its name in the class.
        slices: where a checkpoint may have a tensor that it does not have under its own name.
        experts: most experts of a block.
        separate: whether checkpoints have a matrix for each expert.
        outputs: how many things each block returns; None: a tensor.
        parts: tensor that is one of several which the class keeps in one, below its block -> (name of that one there,
            its shape, the first of its rows).
        carried: arguments in which blocks leave something for later ones.
        handed: argument -> which of the things that the block before returns it is.
        norms: of every block, those whose output is what some layers read: (norm, these layers), below the block.
        outside: weight of a linear layer outside of blocks -> its name in the class.
        last_norm: the one whose output the output layer reads; None: there is none.
    """

    architecture: str
    blocks_path: str
    block_prefix: str
    embedding: str
    head: str
    head_bias: str | None
    streams: Streams
    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[tuple[Linear, ...], ...]
    paths: Mapping[str, str]
    around: Mapping[str, str]
    slices: Mapping[str, Slice]
    experts: int
    separate: bool
    outputs: tuple[int | None, ...]
    parts: Mapping[str, tuple[str, tuple[int, ...], int]] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    handed: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[tuple[tuple[str, tuple[str, ...]], ...], ...] = ()
    last_norm: str | None = None
    outside: Mapping[str, str] = field(default_factory=dict)
