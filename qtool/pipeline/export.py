"""The same codes in another layout: exactly, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.artifact._files import check_free, new_folder
from qtool.artifact._open import open_artifact
from qtool.checkpoint._base import QuantizedCheckpoint, modules
from qtool.errors import PlanError
from qtool.pipeline.events import Listener, silent
from qtool.pipeline.publish import publish
from qtool.pipeline.stopwatch import Stopwatch
from qtool.pipeline.summarize import model_name
from qtool.report.model import ArtifactEntry


@dataclass(frozen=True)
class ExportOptions:
    """What `qtool export` was asked to do.

    Attributes:
        source: a quantized artifact.
        to: name of the layout to write.
        out: folder of the result.
        overwrite: replace an earlier result.
        verify: read the result back.
    """

    source: Path
    to: str
    out: Path
    overwrite: bool = False
    verify: bool = True


def run(options: ExportOptions, listener: Listener = silent) -> ArtifactEntry:
    """Reads one artifact and writes another.

    Raises:
        PlanError: the layout cannot hold these codes, with the reason for each module.
        CheckpointError, StorageError, VerifyError: see there.
    """
    check_free(options.out, options.overwrite)
    artifact: Artifact = registry.load("artifact", options.to)()
    model = open_artifact(options.source)
    check_carries(options.to, artifact, model)
    card = {"base_model": model_name(model.source)}
    with new_folder(options.out, options.overwrite) as folder:
        (entry,) = publish({options.to: artifact}, model, folder, card, options.verify, Stopwatch(), listener)
    return entry


def check_carries(name: str, artifact: Artifact, model: QuantizedCheckpoint) -> None:
    """Refuses, before anything is written, what the layout cannot hold.

    Raises:
        PlanError: a line for each module.
    """
    problems = []
    for module in modules(model):
        carry = artifact.can_carry(module, model.layers.get(module.name), "source")
        if not carry.possible:
            problems.append(f"{module.name}: {carry.reason}")
    if problems:
        raise PlanError(problems, f"{name} cannot hold {model.source}")
