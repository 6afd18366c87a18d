"""Linear layers of a decoder block: where they are, what they do, what they read, and how they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder block.

    Attributes:
        path: below the block: "self_attn.q_proj".
        role: q, k, v, o, gate, up, down; qkv and gate_up where a checkpoint stores them as one matrix.
        reads: the input it shares with others of the block: attn_in, attn_out, mlp_in, mlp_mid.
        fused: the set that runtimes merge: "qkv", "gate_up"; None if never.
        expert: its index in a mixture of experts; None: every token goes through it.
        kind: "router" if it decides where tokens go: such a layer is kept unless a rule names it.
    """

    path: str
    role: str
    reads: str
    fused: str | None = None
    expert: int | None = None
    kind: str = "linear"

    @property
    def behind(self) -> str:
        """`reads`; of an expert's gate and up the input of the block that some of its tokens are routed from."""
        return "mlp_in" if self.expert is not None and self.role != "down" else self.reads


def pairs(linears: Iterable[Linear]) -> Iterator[tuple[Linear, Linear, Linear]]:
    """(v, o, v) and, of each expert, (up, down, gate): what writes, what reads, and what the rows of the first go with.

    A matrix that is stored together with others stands for each of them.
    """
    places = {(x.path.rpartition(".")[0], x.role): x for x in linears}
    for (place, role), reader in places.items():
        if role == "o":
            v = places.get((place, "v")) or places[place, "qkv"]
            yield v, reader, v
        elif role == "down":
            both = places.get((place, "gate_up"))
            yield both or places[place, "up"], reader, both or places[place, "gate"]


@dataclass(frozen=True)
class Slice:
    """Where a matrix or vector is, if a checkpoint stores it as part of a larger tensor.

    Attributes:
        tensor: name of the stored one.
        shape: of the stored one.
        index: into its first extent; None: it has no such extent.
        first, step: of rows, in what the index leaves.
        transposed: whether that is [K, rows] instead of [rows, K].
    """

    tensor: str
    shape: tuple[int, ...]
    index: int | None = None
    first: int = 0
    step: int = 1
    transposed: bool = False


EXPERT = re.compile(r"\.experts\.(\d+)(?=\.)")

STACKED = re.compile(r"\.(experts|altup_projections|altup_unembed_projections)\.(\d+)(?=\.)")


def stacked(name: str) -> tuple[str, int | None]:
    """("mlp.experts.gate_proj.weight", 3) of "mlp.experts.3.gate_proj.weight"; of other names (name, None)."""
    found = STACKED.search(name)
    return (name, None) if found is None else (STACKED.sub(r".\1", name, count=1), int(found[2]))


ATTENTION = (
    Linear("self_attn.q_proj", "q", "attn_in", "qkv"),
    Linear("self_attn.k_proj", "k", "attn_in", "qkv"),
    Linear("self_attn.v_proj", "v", "attn_in", "qkv"),
    Linear("self_attn.o_proj", "o", "attn_out"),
)
GATED_MLP = (
    Linear("mlp.gate_proj", "gate", "mlp_in", "gate_up"),
    Linear("mlp.up_proj", "up", "mlp_in", "gate_up"),
    Linear("mlp.down_proj", "down", "mlp_mid"),
)
