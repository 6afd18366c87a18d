"""The graph of a model: which tensors a rewrite has to change together so that the model computes the same.

Shape letters: C channels of an edge, H attention heads, G key/value heads, D head dimension, E hidden size,
F intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["norm", "heads", "product", "scores", "stream"]


@dataclass(frozen=True)
class Edge:
    """C channels that some modules write and others read.

    What may be done along it depends on what lies between:

    - norm: the output of a norm, E channels. A factor for each goes from the norm's weight to columns of the readers.
    - heads: rows of v, G heads of D channels, to columns of o, which reads every head `repeat` times. Attention adds up
      values, so a factor for each channel goes through, and a matrix of its own for each head.
    - product: rows of up, F channels, to columns of down; they are multiplied with those of gate on the way. A factor
      for each channel goes through, and another order if gate's rows take it too.
    - scores: rows of k, G heads of D channels, to rows of q, of which `repeat` heads meet the same head of keys in the
      products that attention takes the softmax of. A factor goes from the ones to the others, if both channels that the
      rotary embedding turns into each other have the same. Nobody reads these channels through a matrix.
    - stream: the hidden states, E channels. What writes them (the rows of all layers that add to them, the columns of
      the embedding) and what reads them, each behind a norm that only looks at their length. One orthogonal matrix goes
      through all stream edges of a model together, once the weights of these norms are one.

    Attributes:
        kind: see above.
        source: modules that write the channels: "model.layers.0.input_layernorm".
        readers: linear layers whose columns read them. A tied output layer is named like one of its own.
        width: C.
        first: the row of the source that writes the first one; others lie before it where matrices are stored as one.
        repeat: how many columns of a reader, head by head, read the same channel.
        dim: channels that an orthogonal matrix may mix: D for heads, all for a stream; D of scores; 1 for the others.
        rotary: how many first channels of a head are rotated, i with i + rotary / 2.
        offset: what a norm adds to its weight before it multiplies.
        beside: modules whose first rows go along: gate's C, in the same order; q's, times what k's are divided by.
        shifts: whether what is subtracted from all values of a channel arrives at the readers as it is.
    """

    kind: Kind
    source: tuple[str, ...]
    readers: tuple[str, ...]
    width: int
    first: int = 0
    repeat: int = 1
    dim: int = 1
    offset: float = 0.0
    beside: tuple[str, ...] = ()
    shifts: bool = False
    rotary: int = 0

    @property
    def name(self) -> str:
        """Of no other edge of the model: "product model.layers.0.mlp.up_proj"."""
        return f"{self.kind} {self.source[0]}"


def query_and_key(layers: Mapping[str, str], queries: int) -> tuple[str, str, int] | None:
    """(layer of q, layer of k, the row where k begins) by the layers of a block's roles; None: it has no such layers.

    Args:
        layers: by role, without those of experts.
        queries: rows of q, behind which k lies where one layer makes both.
    """
    if both := layers.get("qkv"):
        return both, both, queries
    return (layers["q"], layers["k"], 0) if {"q", "k"} <= layers.keys() else None
