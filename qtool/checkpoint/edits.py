"""Rewrites of a model as data: what is done along which edge, and how a list of them is stored.

A list is one file: `edits` in its metadata are the plain fields as JSON, tensors are named "<index>.<name>".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool import registry
from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.ops._base import InputOp

STREAM = "stream"
"""Name of all stream edges of a model together."""


@dataclass(frozen=True)
class Edit:
    """One rewrite.

    Attributes:
        edge: name of the edge along which the operation is folded away, `STREAM` for the hidden states of the whole
            model; empty: the operation stays on the input of `modules`, whose weights make up for it.
        op: what is done to what the edge's readers, or the modules, read. None: the norm of the edge becomes one, and
            what it multiplied with is folded into its readers.
        modules: see above.
    """

    edge: str = ""
    op: InputOp | None = None
    modules: tuple[str, ...] = ()


def model_edges(model: Checkpoint) -> dict[str, Edge]:
    """All edges of a model by name, in the order of computation."""
    blocks = [*range(model.family.blocks(model.config)), None]
    return {edge.name: edge for i in blocks for edge in model.family.edges(model.config, i)}


def takes_shifts(model: Checkpoint, edge: Edge) -> bool:
    """Whether numbers that are subtracted from channels of an edge arrive, and have biases to be folded into."""
    names = set(model.names())
    return (edge.kind == "norm" or edge.shifts) and all(
        f"{module}.bias" in names for module in (*edge.source, *edge.readers)
    )


def _dump(edits: Sequence[Edit]) -> tuple[str, dict[str, Tensor]]:
    """(JSON, tensors) of a list."""
    listed: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, edit in enumerate(edits):
        plain, own = edit.op.data() if edit.op else ({}, {})
        listed.append({"edge": edit.edge, "op": edit.op and edit.op.name(), "fields": plain, "modules": edit.modules})
        tensors |= {f"{index}.{name}": tensor.cpu().contiguous() for name, tensor in own.items()}
    return json.dumps(listed, sort_keys=True), tensors


def digest(edits: Sequence[Edit]) -> str:
    """Hex digest of a list."""
    listed = [[edit.edge, edit.op and edit.op.digest, edit.modules] for edit in edits]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def write_edits(edits: Sequence[Edit], path: Path, run: str = "", notes: Sequence[str] = ()) -> None:
    """Writes a list, what identifies the run that made it, and what it has to say. Raises StorageError."""
    listed, tensors = _dump(edits)
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    metadata = {"edits": listed, "run": run, "digest": digest(edits), "notes": json.dumps(notes)}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def read_edits(path: Path) -> tuple[tuple[Edit, ...], str, tuple[str, ...]]:
    """Reads a list, what identifies the run that made it, and what that had to say. Raises CheckpointError: damaged."""
    file = SafetensorsFile(path)
    try:
        listed = json.loads(file.metadata["edits"])
        edits = tuple(_parse(entry, file, f"{index}.") for index, entry in enumerate(listed))
        whole, run = file.metadata["digest"] == digest(edits), file.metadata["run"]
        notes = tuple(map(str, json.loads(file.metadata["notes"])))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is no list of edits: {error}") from error
    if not whole:
        raise CheckpointError(f"{path} holds other edits than were written")
    return edits, run, notes


def _parse(entry: Mapping[str, Any], file: SafetensorsFile, prefix: str) -> Edit:
    op = None
    if entry["op"] is not None:
        names = [name for name in file.entries if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): file.read(name) for name in names}
        op = registry.load("ops", str(entry["op"])).load(entry["fields"], tensors)
    return Edit(str(entry["edge"]), op, tuple(map(str, entry["modules"])))
