"""What a model family calls things. One file per family; the file's name is the `model_type` of config.json.

A family says which linear layers a decoder block has, what each of them reads, and which of them runtimes merge.
What GGUF calls the family, and the metadata that file format wants, is said here too, so that a new family is one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder block.

    Attributes:
        path: below the block: "self_attn.q_proj".
        role: q, k, v, o, gate, up, down.
        reads: the input it shares with others of the block: attn_in, attn_out, mlp_in, mlp_mid.
        fused: the set that runtimes merge: "qkv", "gate_up"; None if never.
    """

    path: str
    role: str
    reads: str
    fused: str | None = None


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


class Family:
    """Names of one architecture. Subclasses override what differs.

    Attributes:
        linears: the linear layers of every decoder block, in the order of computation.
        block_prefix: name prefix of block i, with "{i}".
        embedding, norm, head: module names around the blocks.
        gguf_arch: `general.architecture` of its GGUF files.
        gguf_permute: roles whose rows llama.cpp wants in interleaved rotary order.
    """

    linears: ClassVar[tuple[Linear, ...]] = ATTENTION + GATED_MLP
    block_prefix: ClassVar[str] = "model.layers.{i}."
    embedding: ClassVar[str] = "model.embed_tokens"
    norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"
    gguf_arch: ClassVar[str]
    gguf_permute: ClassVar[frozenset[str]] = frozenset()

    def blocks(self, config: dict[str, Any]) -> int:
        """Number of decoder blocks."""
        return int(config["num_hidden_layers"])
