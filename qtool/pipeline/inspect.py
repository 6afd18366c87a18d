"""What is in a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pydantic import BaseModel, ConfigDict

from qtool.checkpoint._base import Checkpoint, Module, QuantizedCheckpoint
from qtool.checkpoint.modules import modules
from qtool.models import identify

NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
METADATA = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


class StoredTensor(BaseModel):
    """One tensor, or (with `tensors`) all of one role and type.

    Attributes:
        name: of the tensor, or the role.
        type: format label or dtype.
        activations: format label of the inputs; None where left alone.
        shape: of one tensor; empty for many.
        blocks: indices of the decoder blocks that it is in.
        tensors: how many.
        parameters: numbers in them.
        bits: stored, parameters of formats included.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    activations: str | None
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    tensors: int
    parameters: int
    bits: int


class Contents(BaseModel):
    """A model on disk.

    Attributes:
        source: what the user called it.
        kind: name of its layout, or "checkpoint".
        family: its architecture.
        metadata: what config.json says about its size.
        header: see `Checkpoint.header`.
        parts: name and bytes of each of `Checkpoint.parts`.
        files: side files.
        roles: tensors by role and type.
        tensors: every tensor.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    kind: str
    family: str
    metadata: dict[str, object]
    header: dict[str, object]
    parts: dict[str, int]
    files: tuple[str, ...]
    roles: tuple[StoredTensor, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(t.parameters for t in self.tensors)

    @property
    def bits(self) -> int:
        """Bits of all tensors."""
        return sum(t.bits for t in self.tensors)


def run(source: str) -> Contents:
    """Opens a model and lists it; no tensor is read.

    Raises:
        CheckpointError, HubError: it cannot be opened.
    """
    kind, model = identify(source)
    known = {module.name: module for module in modules(model)}
    tensors = tuple(stored(model, name, known.get(name.removesuffix(".weight"))) for name in model.names())
    roles = [known[name].role if (name := t.name.removesuffix(".weight")) in known else "other" for t in tensors]
    return Contents(
        source=source,
        kind=kind,
        family=str(model.config["model_type"]),
        metadata={key: model.config[key] for key in METADATA if key in model.config},
        header=dict(model.header),
        parts={path.name: path.stat().st_size for path in model.parts},
        files=tuple(sorted(model.files)),
        roles=grouped(tensors, roles),
        tensors=tensors,
    )


def stored(model: Checkpoint, name: str, module: Module | None) -> StoredTensor:
    """How one tensor is stored; `module` is the matrix that it is, if any."""
    info = model.info(name)
    count = info.nbytes // info.dtype.itemsize
    kind, inputs, bits = str(info.dtype).removeprefix("torch."), None, info.nbytes * 8
    layer = model.layers.get(module.name) if module and isinstance(model, QuantizedCheckpoint) else None
    if layer:
        kind, bits = layer.weight_label, layer.storage_bits(info.shape[0], info.shape[1])
        inputs = layer.activations.label if layer.activations else None
    return StoredTensor(
        name=name,
        type=NAMES.get(kind, kind),
        activations=inputs,
        shape=info.shape,
        blocks=() if module is None or module.block is None else (module.block,),
        tensors=1,
        parameters=count,
        bits=bits,
    )


def grouped(tensors: Sequence[StoredTensor], roles: Sequence[str]) -> tuple[StoredTensor, ...]:
    """One entry per role and type, in the model's order of roles."""
    order = {role: place for place, role in enumerate(dict.fromkeys(roles))}

    def key(pair: tuple[StoredTensor, str]) -> tuple[int, str, str]:
        return order[pair[1]], pair[0].type, pair[0].activations or ""

    pairs = sorted(zip(tensors, roles, strict=True), key=key)
    found = []
    for _, members in groupby(pairs, key):
        alike = list(members)
        first, role = alike[0]
        sums = {
            "blocks": tuple(sorted({block for t, _ in alike for block in t.blocks})),
            "tensors": len(alike),
            "parameters": sum(t.parameters for t, _ in alike),
            "bits": sum(t.bits for t, _ in alike),
        }
        found.append(first.model_copy(update={"name": role, "shape": (), **sums}))
    return tuple(found)
