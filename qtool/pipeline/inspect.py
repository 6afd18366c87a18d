"""What is in a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qtool.artifact._open import find_artifact, open_model
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint, modules

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


class Stored(BaseModel):
    """One tensor, or (with `tensors`) all of one role and type.

    Attributes:
        name: of the tensor, or the role.
        type: format label or dtype.
        activations: format label of the inputs; None where left alone.
        shape: of one tensor; empty for many.
        tensors: how many.
        parameters: numbers in them.
        bits: stored, parameters of formats included.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    activations: str | None
    shape: tuple[int, ...]
    tensors: int
    parameters: int
    bits: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per number."""
        return self.bits / self.parameters


class Contents(BaseModel):
    """A model on disk.

    Attributes:
        source: what the user called it.
        kind: artifact name, or "checkpoint".
        family: its architecture.
        metadata: what config.json says about its size.
        files: side files.
        roles: tensors by role and type.
        tensors: every tensor.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    kind: str
    family: str
    metadata: dict[str, object]
    files: tuple[str, ...]
    roles: tuple[Stored, ...]
    tensors: tuple[Stored, ...]

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
    found = find_artifact(Path(source))
    model = open_model(source)
    roles = {module.name: module.role for module in modules(model)}
    tensors = tuple(stored(model, name) for name in model.names())
    return Contents(
        source=source,
        kind=found[0] if found else "checkpoint",
        family=str(model.config["model_type"]),
        metadata={key: model.config[key] for key in METADATA if key in model.config},
        files=tuple(sorted(model.files)),
        roles=grouped(tensors, [roles.get(t.name.removesuffix(".weight"), "other") for t in tensors]),
        tensors=tensors,
    )


def stored(model: Checkpoint, name: str) -> Stored:
    """How one tensor is stored."""
    info, module = model.info(name), name.removesuffix(".weight")
    count = info.nbytes // info.dtype.itemsize
    kind, inputs, bits = str(info.dtype).removeprefix("torch."), None, info.nbytes * 8
    if isinstance(model, QuantizedCheckpoint) and module in model.layers:
        layer = model.layers[module]
        kind, bits = layer.format.label, layer.format.storage_bits(info.shape[0], info.shape[1])
        inputs = layer.activations.label if layer.activations else None
    return Stored(
        name=name,
        type=NAMES.get(kind, kind),
        activations=inputs,
        shape=info.shape,
        tensors=1,
        parameters=count,
        bits=bits,
    )


def grouped(tensors: Sequence[Stored], roles: Sequence[str]) -> tuple[Stored, ...]:
    """One entry per role and type, in the model's order of roles."""
    order = {role: place for place, role in enumerate(dict.fromkeys(roles))}

    def key(pair: tuple[Stored, str]) -> tuple[int, str, str]:
        return order[pair[1]], pair[0].type, pair[0].activations or ""

    pairs = sorted(zip(tensors, roles, strict=True), key=key)
    found = []
    for _, members in groupby(pairs, key):
        alike = list(members)
        first, role = alike[0]
        sums = {
            "tensors": len(alike),
            "parameters": sum(t.parameters for t, _ in alike),
            "bits": sum(t.bits for t, _ in alike),
        }
        found.append(first.model_copy(update={"name": role, "shape": (), **sums}))
    return tuple(found)
