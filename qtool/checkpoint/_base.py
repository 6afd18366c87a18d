"""What qtool reads from and what its artifacts read back as: names, shapes, tensors one at a time.

A `Checkpoint` is a model whose tensors carry Hugging Face names ("model.layers.0.self_attn.q_proj.weight"), wherever
they are stored. A `QuantizedCheckpoint` also knows, for some modules, codes and parameters; asked for such a weight as
a plain tensor it decodes it. Every artifact's reader returns one, so evaluation and export do not care where it came
from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._parts import stacked
from qtool.formats._base import Format
from qtool.ops._base import InputOp
from qtool.recipe.cache import KVCache
from qtool.residuals._base import Correction, Matrix, Residual


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Checkpoint(ABC):
    """A model on disk.

    Attributes:
        source: what the user called it (folder, hub id, file); for messages and reports.
        config: the model's config.json, as transformers names its fields.
        family: what its architecture calls things.
        files: side files by name (tokenizer.json, generation_config.json, chat_template.jinja, ...), to be copied
            along.
        notes: what the user should know about how it is read.
    """

    source: str
    config: dict[str, Any]
    family: Family
    files: dict[str, Path]
    notes: tuple[str, ...] = ()

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, in the model's own order: embedding, block 0, block 1, ..., norm, head."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and type, without reading the tensor. Raises CheckpointError: no such tensor."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Reads one tensor; nothing of it stays in memory but the result. Raises CheckpointError: it cannot be read."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads rows `start` to `stop` of one tensor. Raises CheckpointError: they cannot be read."""
        return self.tensor(name)[start:stop].clone()

    def rounds(self, name: str) -> bool:
        """Whether a tensor is stored as a function of its numbers, which come back up to rounding."""
        return False

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes with the model's content: of names, sizes and sampled content, not of every byte."""

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    @property
    def header(self) -> Mapping[str, object]:
        """What its file says of itself in words of its own, long lists by their length; empty: nothing."""
        return {}

    @property
    def parts(self) -> Sequence[Path]:
        """The files that it consists of, where they count as one; empty: a folder."""
        return ()

    @property
    def input_ops(self) -> Mapping[str, tuple[InputOp, ...]]:
        """What a runtime has to do to the input of modules, in order, because their weights are made for the result."""
        return {}

    @property
    def tied(self) -> bool:
        """True if the output layer uses the token embedding's matrix."""
        return f"{self.family.head}.weight" not in self.names()


class Static(NamedTuple):
    """What calibration found for a tensor that a runtime rounds with the same parameters every time.

    Attributes:
        scale: exact in the type that the format stores scales in; that of the matrix, where groups have others too.
        zero: zero point, counted as that of integers is; 0 where there is none.
    """

    scale: float
    zero: int = 0


CacheScales = tuple[tuple[Static, ...], tuple[Static, ...]]
"""Those of keys and of values: one per tensor or head, or one per channel, head by head; none for single tokens."""


@dataclass(frozen=True)
class Layer:
    """How a module is quantized.

    Attributes:
        format: representation of its weight.
        activations: representation of its input; None: left alone.
        static: what its input is rounded with; None: that is chosen per token at run time, or not known yet.
        residuals: what corrects its weight, beside the codes, in order.
        input_ops: what is done to its input before that is rounded, in order.
    """

    format: Format
    activations: Format | None = None
    static: Static | None = None
    residuals: tuple[Residual, ...] = ()
    input_ops: tuple[InputOp, ...] = ()

    @property
    def label(self) -> str:
        """What becomes of it in a few words: "q3_k + low_rank", "mxfp4 with mxfp4 inputs behind hadamard-32"."""
        behind = f" behind {', '.join(op.label for op in self.input_ops)}" if self.input_ops else ""
        return self.weight_label + (f" with {self.activations.label} inputs" if self.activations else "") + behind

    @property
    def weight_label(self) -> str:
        """The weight's format, and what corrects it: "q3_k + low_rank"."""
        return " + ".join((self.format.label, *(residual.label for residual in self.residuals)))

    def storage_bits(self, n: int, k: int) -> int:
        """Bits that a matrix of n rows and k columns takes, with parameters and corrections."""
        return self.format.storage_bits(n, k) + sum(residual.storage_bits(n, k) for residual in self.residuals)

    @property
    def unmeasured(self) -> bool:
        """True if its inputs have one scale for all tokens, and nobody knows it yet."""
        return self.activations is not None and self.activations.static and self.static is None


@dataclass(frozen=True)
class Cache:
    """How keys and values are rounded when they enter the KV cache, keys behind the rotary embedding.

    Attributes:
        format: of both; see `Format.granularity` for what shares a scale. Per token, heads are rounded by themselves.
        statics: what calibration found for each decoder block; empty if that is nothing.
    """

    format: KVCache
    statics: Mapping[int, CacheScales]


class QuantizedCheckpoint(Checkpoint):
    """A model some of whose linear weights are stored as codes.

    Attributes:
        layers: module name ("model.layers.0.mlp.up_proj") -> how it is stored. `names()` lists its weight as
            "<module>.weight" all the same, with the shape and type of the decoded tensor.
    """

    layers: Mapping[str, Layer]
    cache: Cache | None = None
    """How the KV cache is rounded; None: not at all."""
    has_codes: ClassVar[bool] = True
    """False where weights are rounded while they are read, and `matrix` has nothing to give."""

    @property
    def input_ops(self) -> Mapping[str, tuple[InputOp, ...]]:
        """See `Checkpoint.input_ops`."""
        return {module: layer.input_ops for module, layer in self.layers.items() if layer.input_ops}

    @property
    def decoded(self) -> Mapping[str, str]:
        """Modules that cannot be exported as they are stored, because no format of qtool says all of it: name -> why.

        Those that are not in `layers` either are decoded when they are read.
        """
        return {}

    @abstractmethod
    def matrix(self, module: str) -> Matrix:
        """Codes, parameters and corrections of one module of `layers`."""

    def corrections(self, module: str) -> Sequence[Correction]:
        """Only what is kept beside the codes."""
        return self.matrix(module).residuals


@dataclass(frozen=True)
class Module:
    """A matrix that a recipe can give a format to.

    Attributes:
        name: module path without ".weight".
        aliases: other names of the same matrix: "lm_head" of a tied embedding.
        kind: "linear", "embedding", or "router" for a linear layer that decides which experts a token goes to.
        role: what it does, the same word in every family: q, k, v, o, gate, up, down, router, embedding, head.
        block: index of its decoder block; None outside of them.
        reads: name of the input it reads, shared by all modules that read the same one: "model.layers.0.attn_in".
        fused: name of the set that runtimes merge into one matrix: "model.layers.0.qkv"; None if they never do.
        shape: (N, K).
        expert: index of its expert; None: every token goes through it.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    role: str
    block: int | None
    reads: str
    fused: str | None
    shape: tuple[int, int]
    expert: int | None = None

    @property
    def stack(self) -> str | None:
        """Name of the set of all experts' matrices that some layouts store as one tensor; None outside of experts."""
        return None if self.expert is None else stacked(self.name)[0]
