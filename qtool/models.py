"""Any path -> the model in it: a quantized artifact of any registered layout, or a plain checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.artifact._mxfp4_experts import MXFP4Experts
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.checkpoint.equal import equal_model
from qtool.checkpoint.hf import BY_NAMES, TOLD_APART, WHOLE, HFCheckpoint
from qtool.checkpoint.language import comes_apart
from qtool.checkpoint.open import find_model, local, open_checkpoint
from qtool.errors import CheckpointError, reading


def find_artifact(path: Path) -> tuple[str, Callable[[Path], QuantizedCheckpoint]] | None:
    """Name and reader of the artifact at a path; None if no registered one recognizes it.

    Raises:
        CheckpointError: the system refuses to read it.
    """
    with reading(path):
        for name in registry.names("artifact"):
            artifact: type[Artifact] = registry.load("artifact", name)
            if artifact.recognizes(path):
                return name, artifact().open
        return ("mxfp4 experts", MXFP4Experts) if MXFP4Experts.recognizes(path) else None


def open_artifact(source: str | Path) -> QuantizedCheckpoint:
    """Opens a quantized artifact of any layout; see `open_model`.

    Raises:
        CheckpointError: it is damaged, or none.
        HubError: the hub refused or cannot be reached.
    """
    model = open_model(str(source))
    if not isinstance(model, QuantizedCheckpoint):
        known = ", ".join(registry.names("artifact"))
        hint = "quantize it; a recipe whose rules say keep: bf16 writes unquantized weights in another layout"
        raise CheckpointError(f"{source} holds no quantized artifact", wanted=f"one of {known}", hint=hint)
    return model


def open_model(source: str) -> Checkpoint:
    """Opens an artifact or a checkpoint: a folder, a file, or a hub id.

    Raises:
        CheckpointError: it is damaged, of an unknown kind, or cannot be found.
        HubError: the hub refused or cannot be reached.
    """
    return identify(source)[1]


def identify(source: str) -> tuple[str, Checkpoint]:
    """Name of a model's layout, "checkpoint" if it is a plain one, and the model; see `open_model`."""
    path = local(source)
    with reading(path):
        path = path if os.path.exists(path) else find_model(source)
    found = find_artifact(path)
    model = found[1](path) if found else open_checkpoint(str(path))
    model.source = source
    return found[0] if found else "checkpoint", model


def open_model_free(source: str) -> Checkpoint:
    """Opens a folder of safetensors, or what the hub has, by names and shapes of tensors; see `open_model`."""
    path = find_model(source)
    if path.is_file():
        hint = "leave out --model-free"
        raise CheckpointError(f"{source} is a GGUF file", wanted="a folder of safetensors", hint=hint)
    token = BY_NAMES.set(True)
    try:
        found = find_artifact(path)
        model: Checkpoint = found[1](path) if found else HFCheckpoint(path, source)
    finally:
        BY_NAMES.reset(token)
    model.source = source
    return model


def open_apart(source: str) -> Checkpoint:
    """Opens a model so that linear layers which its class keeps in one are layers of their own; see `open_model`."""
    token = TOLD_APART.set(True)
    try:
        return open_model(source)
    finally:
        TOLD_APART.reset(token)


def open_whole(model: Checkpoint, exports: Collection[str]) -> Checkpoint:
    """The model with all of its parts, where all layouts that it is exported to copy what is beside a text model."""
    layouts: list[type[Artifact]] = [registry.load("artifact", name) for name in exports]
    if not isinstance(model, HFCheckpoint) or not model.left_out or not all(layout.besides for layout in layouts):
        return model
    token = WHOLE.set(True)
    try:
        return open_model(model.source)
    except CheckpointError:  # its class does not go through block by block: what is left out is told
        return model
    finally:
        WHOLE.reset(token)


def fit(model: Checkpoint, exports: Collection[str]) -> Checkpoint:
    """The model, so opened and changed that what it is exported to can hold it.

    GGUF has tensors for layers that other layouts keep in one, and some that are other ones. A model that is like that
    already is changed back for other layouts.
    """
    if set(exports) == {"gguf"}:
        return equal_model(open_apart(model.source) if comes_apart(model) else model)
    return model if "gguf" in exports else equal_model(model, forth=False)
