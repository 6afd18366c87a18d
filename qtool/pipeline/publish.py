"""From codes in the neutral checkpoint to artifacts on disk: write, read back, describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.artifact._base import Artifact
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.evaluate.proof import prove
from qtool.evaluate.result import Proof
from qtool.evaluate.twin import prove_twin
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.stopwatch import Stopwatch
from qtool.pipeline.verify import verify
from qtool.report.model import ArtifactEntry, FileEntry
from qtool.report.model_card import write_card
from qtool.store.files import hashes, settling, write_sums


def publish(
    artifacts: Mapping[str, Artifact],
    model: QuantizedCheckpoint,
    folder: Path,
    card: dict[str, Any],
    check: bool,
    watch: Stopwatch,
    listener: Listener,
    ranks: Ranks = ALONE,
) -> tuple[ArtifactEntry, ...]:
    """Writes artifacts into a temporary folder: one into the folder itself, several into a subfolder each.

    Args:
        artifacts: writers by name.
        model: what to write.
        folder: exists, is empty, and gets its final name from the caller.
        card: see `Artifact.write`.
        check: read every artifact back and compare, and have another program run it where there is one.
        watch: counts each write and each verification as a stage.
        listener: called with events of progress.
        ranks: who reads back together what the first process writes; only it returns something.

    Raises:
        VerifyError: an artifact read back differs.
        PlanError, StorageError: see `Artifact.write`.
    """
    entries = []
    for name, artifact in artifacts.items():
        place = folder if len(artifacts) == 1 else folder / name
        about = {"base_model": model.source, **card, "caveats": artifact.caveats(model, model.layers)}
        listener(Event(f"write {name}", 0, 1))
        with watch.stage(f"write {name}"):
            if ranks.first:
                place.mkdir(exist_ok=True)
            ranks.barrier()
            files = [*artifact.write_together(model, place, card, ranks)]
            beside = [write_card(artifact, artifact.open(place), place, about)] if ranks.first else []
            ranks.barrier()
        listener(Event(f"write {name}", 1, 1))
        proof = None
        with settling(files):
            if check:
                with watch.stage(f"verify {name}"):
                    written = artifact.open(place)
                    verify(f"verify {name}", written, artifact.part(model), listener, ranks)
                    ranks.barrier()
                if ranks.first and artifact.reading(written):
                    with watch.stage(f"run {name}"):
                        proof = run_apart(name, artifact, written, place, model, about, listener)
        if not ranks.first:
            continue
        if place != folder:
            write_sums(place)
        entries.append(describe(name, artifact, place, sorted(files + beside), folder, check, proof))
    return tuple(entries)


def run_apart(
    name: str,
    artifact: Artifact,
    written: QuantizedCheckpoint,
    place: Path,
    model: QuantizedCheckpoint,
    card: dict[str, Any],
    listener: Listener,
) -> Proof | None:
    """Has another program run an artifact, and says so in its model card.

    Raises:
        VerifyError, CheckpointError: see `prove`.
    """
    listener(Event(f"run {name}", 0, 1))
    part = artifact.part(model)
    prove_twin(artifact, part)
    proof = prove(artifact, written, part)
    if proof and proof.tokens:
        write_card(artifact, written, place, card | {"proof": proof.words})
    failed = bool(proof and "cannot run" in proof.why_not)
    listener(Event(f"run {name}", 1, 1, proof.words if proof else "", warning=failed))
    return proof


def describe(
    name: str,
    artifact: Artifact,
    place: Path,
    files: Sequence[Path],
    folder: Path,
    checked: bool,
    proof: Proof | None = None,
) -> ArtifactEntry:
    """The report's entry of a written artifact; paths are relative to the output folder."""
    return ArtifactEntry(
        kind=name,
        path=place.relative_to(folder).as_posix(),
        files=tuple(
            FileEntry(name=f.relative_to(place).as_posix(), nbytes=f.stat().st_size, sha256=digest)
            for f, digest in zip(files, hashes(files), strict=True)
        ),
        runtimes=artifact.runtimes,
        verified=checked,
        proof=proof,
    )
