"""What a model family calls things. One file per family; the file's name is the `model_type` of config.json.

A family says which linear layers a decoder block has, what each of them reads, and which of them runtimes merge.
What GGUF calls the family, and the metadata that file format wants, is said here too, so that a new family is one file.

Shape letters: H attention heads, G key/value heads, D head dimension, E hidden size, F intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.checkpoint.families._edges import Edge, query_and_key
from qtool.checkpoint.families._gguf import Form, check_biases, name_map, some_slide
from qtool.checkpoint.families._parts import ATTENTION, GATED_MLP, Linear, Slice, pairs, stacked
from qtool.checkpoint.families._rope import LLAMA3_TENSOR, check_llama3, llama3_factors, rope_metadata
from qtool.errors import CheckpointError

OUTPUT = "lm_head"
"""What recipes call the output layer, whatever a model calls it."""

Value = int | float | bool | str | list[int] | list[float]
"""A GGUF metadata value: int is stored as UINT32, float as FLOAT32."""


GGUF_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""GGUF metadata key below the architecture's name -> field of config.json."""


class Family:
    """Names of one architecture. Subclasses override what differs.

    Attributes:
        architecture: the model class in transformers, as config.json's `architectures` names it.
        defaults: what transformers assumes where config.json says nothing.
        linears: the linear layers of a plain decoder block, in the order of computation.
        norms: the norms of every block, below it, and the input that each feeds, as `Linear.reads` names it; "head" for
            one over heads of q or k, "stream" for one whose output is added to the hidden states.
        norm_offset: what norms add to their weight before they multiply.
        gated_product: whether down reads act(gate) * up.
        sinks: whether attention gives part of its weight to nothing, so that a token's weights do not add up to one.
        block_prefix: name prefix of block i, with "{i}".
        blocks_path: what transformers' class calls the list of blocks.
        derived: whether all this was found by looking at transformers' class; tensors that it does not know are copied.
        model_free: whether all that is known comes from names and shapes of tensors, so that the model cannot be run.
        embedding, norm, head: module names around the blocks.
        gguf_arch: `general.architecture` of its GGUF files.
        mixture: True if blocks hold experts, of which each token visits some.
        separate_experts: False if transformers knows the matrices of all experts as one tensor only.
        spellings: other names of fields of config.json.
        counts: fields of config.json that must be positive integers, beside those of every family.
        activation: field of config.json that names the activation function, and the only one that llama.cpp computes.
        attention: transformers' attention implementation that computes it rightly; None: whichever it prefers.
        rope_kinds: kinds of rotary scaling that llama.cpp knows for it.
        gguf_marker: metadata key that tells it from a family of the same `gguf_arch`; None if it is the plain one.
        gguf_permute: roles whose rows llama.cpp wants in interleaved rotary order.
        gguf_untied: whether llama.cpp wants a matrix for the output layer even where it is the token embedding's.
    """

    architecture: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {}
    linears: ClassVar[tuple[Linear, ...]] = ATTENTION + GATED_MLP
    norms: ClassVar[dict[str, str]] = {"input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in"}
    norm_offset: ClassVar[float] = 0.0
    gated_product: ClassVar[bool] = True
    sinks: ClassVar[bool] = False
    block_prefix: ClassVar[str] = "model.layers.{i}."
    blocks_path: ClassVar[str] = "model.layers"
    derived: ClassVar[bool] = False
    model_free: ClassVar[bool] = False
    embedding: ClassVar[str] = "model.embed_tokens"
    norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"
    mixture: ClassVar[bool] = False
    separate_experts: ClassVar[bool] = True
    spellings: ClassVar[dict[str, str]] = {}
    counts: ClassVar[tuple[str, ...]] = ()
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    attention: ClassVar[str | None] = None
    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    gguf_arch: ClassVar[str]
    gguf_marker: ClassVar[str | None] = None
    gguf_permute: ClassVar[frozenset[str]] = frozenset()
    gguf_untied: ClassVar[bool] = False

    def blocks(self, config: dict[str, Any]) -> int:
        """Number of decoder blocks."""
        return int(config["num_hidden_layers"])

    def heads(self, config: dict[str, Any]) -> tuple[int, int, int]:
        """(H, G, D)."""
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return heads, kv_heads, int(config.get("head_dim") or config["hidden_size"] // heads)

    def rotary_dim(self, config: dict[str, Any]) -> int:
        """Elements of a head that are rotated."""
        return self.heads(config)[2]

    def rope(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the rotary embedding of full attention in the usual fields."""
        return config

    def embedding_scale(self, config: dict[str, Any]) -> float:
        """What embeddings are multiplied with before the first block."""
        return 1.0

    def logit_softcap(self, config: dict[str, Any]) -> float | None:
        """c if logits x become c * tanh(x / c)."""
        return None

    def experts(self, config: dict[str, Any]) -> int:
        """Experts of every block; 0 in a dense model."""
        return 0

    def has_bias(self, config: dict[str, Any], role: str) -> bool:
        """True if linear layers of that role add a bias."""
        return False

    def shapes(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, in the model's order. The output matrix is left out where it is tied."""
        vocab, hidden = int(config["vocab_size"]), int(config["hidden_size"])
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (vocab, hidden)}
        for i in range(self.blocks(config)):
            prefix = self.block_prefix.format(i=i)
            shapes.update({prefix + name: shape for name, shape in self.block_shapes(config, i).items()})
        shapes[f"{self.norm}.weight"] = (hidden,)
        if not config.get("tie_word_embeddings", False):
            shapes[f"{self.head}.weight"] = (vocab, hidden)
        return shapes

    def block_linears(self, config: dict[str, Any], i: int) -> tuple[Linear, ...]:
        """The linear layers of block i, in the order of computation."""
        return self.linears

    def block_shapes(self, config: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of block i, by its name below the block."""
        hidden, dim = int(config["hidden_size"]), self.heads(config)[2]
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.block_linears(config, i):
            n, k = self.linear_shape(config, linear)
            shapes[f"{linear.path}.weight"] = (n, k)
            if self.has_bias(config, linear.role):
                shapes[f"{linear.path}.bias"] = (n,)
        return shapes | {f"{norm}.weight": (dim if feeds == "head" else hidden,) for norm, feeds in self.norms.items()}

    def linear_shape(self, config: dict[str, Any], linear: Linear) -> tuple[int, int]:
        """(N, K) of a linear layer."""
        hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
        heads, kv_heads, dim = self.heads(config)
        rows = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim, "o": hidden}
        rows |= {"gate": wide, "up": wide, "down": hidden}
        columns = {"attn_in": hidden, "attn_out": heads * dim, "mlp_in": hidden, "mlp_mid": wide}
        return rows[linear.role], columns[linear.reads]

    def edges(self, config: dict[str, Any], i: int | None) -> tuple[Edge, ...]:
        """What ties the tensors of block i, or those before and behind all blocks (None), in the order of computation.

        The stream is left out if something else than norms of weight one can lie between its writers and readers.
        """
        hidden, plain = int(config["hidden_size"]), "stream" not in self.norms.values()
        if i is None:
            stream = Edge("stream", (self.embedding,), (self.head,), hidden, dim=hidden)
            return Edge("norm", (self.norm,), (self.head,), hidden, offset=self.norm_offset), *[stream] * plain
        linears = self.block_linears(config, i)
        prefix = self.block_prefix.format(i=i)
        edges, readers = [], tuple(prefix + x.path for x in linears if x.behind in self.norms.values())
        for norm, feeds in self.norms.items():
            if found := tuple(prefix + x.path for x in linears if x.behind == feeds):
                edges.append(Edge("norm", (prefix + norm,), found, hidden, offset=self.norm_offset))
        if "head" not in self.norms.values():
            edges += self.score_edges(config, linears, prefix)
        for source, reader, gate in pairs(linears):
            n, (heads, kv_heads, dim) = self.linear_shape(config, source)[0], self.heads(config)
            ends = (prefix + source.path,), (prefix + reader.path,)
            if reader.role == "o":
                width, shifts = kv_heads * dim, not self.sinks
                edges.append(Edge("heads", *ends, width, n - width, heads // kv_heads, dim, shifts=shifts))
            elif self.gated_product:
                width = self.linear_shape(config, reader)[1]
                edges.append(Edge("product", *ends, width, n - width, beside=(prefix + gate.path,)))
        if plain:
            writers = tuple(prefix + x.path for x in linears if x.role in ("o", "down"))
            edges.append(Edge("stream", writers, readers, hidden, dim=hidden))
        return tuple(edges)

    def score_edges(self, config: dict[str, Any], linears: Sequence[Linear], prefix: str) -> Iterator[Edge]:
        """From k to q of a block, where no norm lies between them and their products."""
        (heads, kv_heads, dim), found = self.heads(config), {x.role: prefix + x.path for x in linears}
        if ends := query_and_key(found, heads * dim):
            (q, k, first), repeat = ends, heads // kv_heads
            rotary = self.rotary_dim(config)
            yield Edge("scores", (k,), (), kv_heads * dim, first, repeat, dim, beside=(q,), rotary=rotary)

    def slices(self, config: dict[str, Any], stored: Collection[str]) -> dict[str, Slice]:
        """Tensors of the model that a checkpoint with these tensors stores otherwise than under their own names."""
        return {}

    def submodule(self, path: str) -> str:
        """What transformers' class calls the module or tensor that checkpoints call `path`, both below the block."""
        return path

    def class_path(self, module: str) -> str:
        """What transformers' class calls a module of a checkpoint."""
        return module

    def linear_outside(self, name: str) -> bool | None:
        """Whether a tensor outside of blocks is a linear layer's weight; None: nobody but its name knows."""
        return None

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """The architecture's key-values of a GGUF file, full keys; `general.*` and `tokenizer.*` are the writer's.

        Raises:
            CheckpointError: the format has no word for something in the config.
        """
        field, wanted = self.activation
        if (found := config.get(field, wanted)) != wanted:
            raise CheckpointError("GGUF cannot hold this activation function", wanted=wanted, found=found)
        heads, kv_heads, dim = self.heads(config)
        known = config | {"num_key_value_heads": kv_heads}
        values: dict[str, Value] = {key: known[field] for key, field in GGUF_FIELDS.items()}
        values["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
        values["rope.dimension_count"] = self.rotary_dim(config)
        if dim * heads != config["hidden_size"]:
            values |= {"attention.key_length": dim, "attention.value_length": dim}
        values |= rope_metadata(self.rope(config), self.rope_kinds)
        return {f"{self.gguf_arch}.{key}": value for key, value in values.items()}

    def gguf_window(self, config: dict[str, Any]) -> int | None:
        """Tokens up to which llama.cpp computes the same, because it lets attention see more than a window.

        None: it knows the window, or there is none.
        """
        slides = config.get("use_sliding_window") and some_slide(config, self.blocks(config))
        return config.get("sliding_window") or None if slides else None

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """Fields of config.json that only this family has, from a GGUF file's key-values and tensor names."""
        return {}

    def gguf_extra_tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors that GGUF wants and the checkpoint only implies, float32."""
        check_llama3(self.rope(config), self.rotary_dim(config))
        factors = llama3_factors(self.rope(config), self.rotary_dim(config))
        return {} if factors is None else {LLAMA3_TENSOR: factors}

    def gguf_names(self, config: dict[str, Any]) -> dict[str, str]:
        """Name here -> name in GGUF of every tensor of the model, also of an output matrix that is tied if it has one.

        All experts' matrices of one role in a block have the name of the one tensor in which GGUF stacks them.
        """
        names = name_map(self.gguf_arch, self.blocks(config))
        mapped = {}
        shapes, head = self.shapes(config), f"{self.head}.weight"
        for name in [*shapes, head]:
            found = names.get_name(stacked(name)[0], try_suffixes=(".weight", ".bias"))
            if found is None and name == head and head not in shapes:
                continue
            if found is None:
                raise CheckpointError(
                    f"the gguf package has no name for tensor {name} of architecture {self.gguf_arch}"
                )
            mapped[name] = found
        check_biases(self.gguf_arch, mapped)
        return mapped

    def gguf_rows(self, config: dict[str, Any], role: str) -> Tensor | None:
        """Order of rows in GGUF: its row j is row `order[j]` here; int64 [N]. None if the order is the same.

        Transformers rotates element i of a head with element i + D/2, llama.cpp's `llama` with its neighbour, so the
        halves are interleaved. Biases and packed rows are permuted alike; `order.argsort()` is the way back.
        Source: https://github.com/ggml-org/llama.cpp, conversion of LlamaModel.
        """
        if role not in self.gguf_permute:
            return None
        heads, kv_heads, dim = self.heads(config)
        count = kv_heads if role == "k" else heads
        return torch.arange(count * dim).view(count, 2, dim // 2).transpose(1, 2).reshape(-1)

    def gguf_form(self, config: dict[str, Any], name: str) -> Form | None:
        """How GGUF stores a tensor otherwise than in its own shape and numbers; None: it does not."""
        return None

    def gguf_offset(self, name: str) -> float:
        """What GGUF adds to every value of a tensor: its norms multiply with the weight alone."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0
