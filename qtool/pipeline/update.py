"""Adds a later evaluation to what a run left: report, pages, model card and checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.errors import UsageError
from qtool.evaluate.result import Evaluation, TaskEvaluation
from qtool.pipeline.card import card_of
from qtool.pipeline.one_file import described
from qtool.report.model import ArtifactEntry, FileEntry, Report
from qtool.report.model_card import write_card
from qtool.report.render import read_report, write_report
from qtool.store.files import SUMS, renew_sums, sha256

CARD = "README.md"
SAME = ("text_sha256", "context", "chunks", "runtime", "artifact", "baseline")
"""What two evaluations must share for the later one to replace the earlier."""


def result_of(artifact: Path) -> Path:
    """The folder of the run's result that an artifact belongs to.

    Args:
        artifact: the artifact's folder, a file in it, or the second name of one (see `qtool.pipeline.one_file`).

    Raises:
        UsageError: no report lies there or above, or it does not name this artifact.
        CheckpointError: the report cannot be read.
    """
    artifact = described(artifact)
    place = artifact.parent if artifact.is_file() else artifact
    for folder in (place, place.parent):
        if (folder / "report.json").is_file():
            places = [folder / entry.path for entry in read_report(folder / "report.json").artifacts]
            if place.resolve() in [known.resolve() for known in places]:
                return folder
    raise UsageError("--update", wanted="an artifact of `qtool quantize` with its report.json", found=artifact)


def check_baseline(folder: Path, evaluation: Evaluation | TaskEvaluation) -> None:
    """Raises UsageError: the evaluation compared with another model than the run began with."""
    wanted = read_report(folder / "report.json").source_fingerprint
    if evaluation.baseline not in (None, wanted):
        hint = "give the model that it was made from as --baseline, or leave --update out"
        raise UsageError("--update: the baseline is not the model that the artifact was made from", hint=hint)


def update(artifact: Path, evaluation: Evaluation) -> Report:
    """Writes report, pages, cards and checksums anew, with one more evaluation.

    Args:
        artifact: what was evaluated; see `result_of`.
        evaluation: takes the place of an earlier one of the same text and models.

    Raises:
        UsageError: see `result_of`, `check_baseline`.
        StorageError: the disk is full or not writable.
    """
    folder = result_of(artifact)
    check_baseline(folder, evaluation)
    report = read_report(folder / "report.json")
    kept = [e for e in report.evaluations if any(getattr(e, key) != getattr(evaluation, key) for key in SAME)]
    return rewritten(folder, report.model_copy(update={"evaluations": (*kept, evaluation)}))


def update_tasks(artifact: Path, evaluation: TaskEvaluation) -> Report:
    """The same with tasks, which take the place of earlier ones of the same names and settings."""
    folder = result_of(artifact)
    check_baseline(folder, evaluation)
    report = read_report(folder / "report.json")

    def key(e: TaskEvaluation) -> tuple[object, ...]:
        return {s.task for s in e.scores}, e.fewshot, e.limit, e.runtime, e.artifact, e.baseline

    kept = [e for e in report.tasks if key(e) != key(evaluation)]
    return rewritten(folder, report.model_copy(update={"tasks": (*kept, evaluation)}))


def rewritten(folder: Path, report: Report) -> Report:
    """Writes a changed report, its pages, and the cards that quote it."""
    report = report.model_copy(update={"artifacts": tuple(_card(folder, each, report) for each in report.artifacts)})
    written = [path.name for path in write_report(report, folder)]
    for each in report.artifacts:
        place = folder / each.path
        written.append((place / CARD).relative_to(folder).as_posix())
        if place != folder:
            renew_sums(place, [CARD])
            written.append((place / SUMS).relative_to(folder).as_posix())
    renew_sums(folder, written)
    return report


def _card(folder: Path, entry: ArtifactEntry, report: Report) -> ArtifactEntry:
    """Writes an artifact's model card anew; what the report says of its file follows."""
    place = folder / entry.path
    layout: Artifact = registry.load("artifact", entry.kind)()
    about: dict[str, Any] = {"proof": entry.proof.words} if entry.proof and entry.proof.tokens else {}
    own = f"{entry.kind}: "
    about["caveats"] = [text.removeprefix(own) for text in report.warnings if text.startswith(own)]
    path = write_card(layout, layout.open(place), place, card_of(report) | about)
    card = FileEntry(name=CARD, nbytes=path.stat().st_size, sha256=sha256(path))
    return entry.model_copy(update={"files": tuple(card if file.name == CARD else file for file in entry.files)})
