"""Any path -> the model in it: a quantized artifact of any registered layout, or a plain checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.artifact._mxfp4_experts import MXFP4Experts
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.checkpoint.open import find_model, open_checkpoint
from qtool.errors import CheckpointError


def find_artifact(path: Path) -> tuple[str, Callable[[Path], QuantizedCheckpoint]] | None:
    """Name and reader of the artifact at a path; None if no registered one recognizes it."""
    if not path.exists():
        return None
    for name in registry.names("artifact"):
        artifact: type[Artifact] = registry.load("artifact", name)
        if artifact.recognizes(path):
            return name, artifact().open
    return ("mxfp4 experts", MXFP4Experts) if MXFP4Experts.recognizes(path) else None


def open_artifact(path: Path) -> QuantizedCheckpoint:
    """Opens a quantized artifact of any layout.

    Raises:
        CheckpointError: it is damaged, or none.
    """
    found = find_artifact(path)
    if found is None:
        what = "holds no quantized artifact" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}", wanted=f"one of {', '.join(registry.names('artifact'))}")
    return found[1](path)


def open_model(source: str) -> Checkpoint:
    """Opens an artifact or a checkpoint: a folder, a file, or a hub id.

    Raises:
        CheckpointError: it is damaged, of an unknown kind, or cannot be found.
        HubError: the hub refused or cannot be reached.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = find_model(source)
    found = find_artifact(path)
    model = found[1](path) if found else open_checkpoint(str(path))
    model.source = source
    return model
