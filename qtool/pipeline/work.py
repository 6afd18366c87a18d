"""The work folder `OUT.work`: finished blocks, and what identifies the run that made them, so that it can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import registry
from qtool.checkpoint._base import CacheScales
from qtool.checkpoint.edits import Edit, digest
from qtool.errors import CheckpointError, StorageError
from qtool.methods._base import BlockTask
from qtool.numerics.threads.processor import processor
from qtool.numerics.threads.ranks import Ranks
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.found import in_memory
from qtool.pipeline.prepare import Job
from qtool.pipeline.solver import Input, Solved, UnitSolver
from qtool.pipeline.units import Unit, cache_format
from qtool.report.model import BlockEntry, CacheEntry, Entry, LayerEntry
from qtool.store.files import storage_errors
from qtool.store.lock import lock
from qtool.store.manifest import MANIFEST, Manifest, StoredBlock
from qtool.store.neutral import NeutralCheckpoint, NeutralWriter


class Record(Entry):
    """What the report says about a unit."""

    layers: tuple[LayerEntry, ...]
    cache: CacheEntry | None = None
    blocks: tuple[BlockEntry, ...] = ()


class Work:
    """Finished units of one run; as a `Solver` it gives their matrices back.

    Args:
        folder: exists.
        job: the run.
        run: what identifies it, see `identity`.
        listener: told about units that an earlier run finished and that are damaged now.
    """

    resumed = True

    def __init__(self, folder: Path, job: Job, run: Mapping[str, Any], listener: Listener) -> None:
        self.folder, self.source, self.run = folder, job.checkpoint, run
        layers = job.plan.layers
        keep = {p.module.name: p.keep for p in layers if p.format is None}
        self.writer = NeutralWriter(folder, run, keep, cache_format(job.plan))
        self.finished: dict[str, Any] = self.writer.finished() if job.ranks.first else {}
        for key, damage in self.writer.damaged.items():
            listener(Event("quantize", 0, 0, f"{key} in {folder} is done again: {damage}", warning=True))
        self.earlier: NeutralCheckpoint | None = None
        self.unsettled = False

    def begin(self, ranks: Ranks) -> None:
        """Has every process know what is finished, as the first one found it."""
        self.finished = ranks.broadcast(self.finished)
        self.earlier = self.model() if self.finished else None

    def record(self, unit: Unit) -> Record | None:
        """Of a unit that is finished or has nothing to be done; None: it has to be done."""
        if not unit.quantized and not unit.cache:
            return Record(layers=())
        return Record.model_validate(self.finished[unit.name]) if unit.name in self.finished else None

    def solve(self, inputs: Sequence[Input], weights: Mapping[str, Tensor] | None = None) -> Solved:
        """See `Solver.solve`: what the earlier run found."""
        assert self.earlier is not None
        names = [p.module.name for plans, _ in inputs for p in plans]
        return {name: (self.earlier.matrix(name), self.earlier.layers[name]) for name in names}

    def solve_block(self, task: BlockTask) -> Iterator[Solved]:
        """See `Solver.solve_block`: what the earlier run found is final."""
        return iter(())

    def store(self, unit: Unit, solver: UnitSolver, record: Record, cache: CacheScales | None = None) -> StoredBlock:
        """Writes a unit that is finished when the first process has entered it."""
        content = record.model_dump(mode="json")
        solver.matrices = in_memory(solver.matrices)  # which frees the device's memory before they are packed
        layers, taken = solver.layers, solver.taken
        return self.writer.write_block(unit.name, solver.matrices, content, layers=layers, cache=cache, taken=taken)

    def enter(self, unit: Unit, entry: StoredBlock) -> None:
        """Counts a stored unit as finished.

        One whose matrices all stay in the source is as quickly done again: it counts with the next, or when settled.
        """
        taken = [layer.taken for layer in entry.layers.values()]
        self.unsettled = bool(taken) and all(taken) and entry.cache is None
        self.writer.enter(unit.name, entry, save=not self.unsettled)

    def settle(self) -> None:
        """Has all units count that were entered."""
        if self.unsettled:
            self.writer.manifest.save(self.folder)
            self.unsettled = False

    def model(self) -> NeutralCheckpoint:
        """What is finished, together with the source's other tensors."""
        self.settle()
        return NeutralCheckpoint(self.folder, self.source)


@contextmanager
def open_work(folder: Path, job: Job, run: Mapping[str, Any], listener: Listener) -> Iterator[Work]:
    """Opens the work folder, or begins it; the first process holds it for all.

    Raises:
        StorageError: it holds something else, is damaged, another process holds it, or it cannot be written.
    """
    with ExitStack() as stack:
        if job.ranks.first:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
            discard_other(folder, run, listener)
            work = Work(folder, job, run, listener)
            job.ranks.barrier()
        else:
            job.ranks.barrier()  # for the manifest
            work = Work(folder, job, run, listener)
        work.begin(job.ranks)
        yield work


def begun(folder: Path, run: Mapping[str, Any]) -> bool:
    """True if a work folder belongs to the same run. Raises StorageError: its manifest is damaged."""
    return (folder / MANIFEST).exists() and _run_of(folder) == run


def _run_of(folder: Path) -> dict[str, Any]:
    """What identifies the run that began a work folder."""
    try:
        return Manifest.salvage(folder)[0].run
    except CheckpointError as error:
        hint = f"remove {folder}, or choose another output"
        raise StorageError(f"the work folder is damaged: {error}", hint=hint) from error


def remove_work(folder: Path, out: Path) -> None:
    """Removes a work folder under a name that the next run cleans up, should this one be killed half-way."""
    with storage_errors(folder):
        leftover = out.with_name(f".{out.name}.finished.partial")
        shutil.rmtree(leftover, ignore_errors=True)
        folder.rename(leftover)
        shutil.rmtree(leftover)


def discard_other(folder: Path, run: Mapping[str, Any], listener: Listener) -> None:
    """Empties a work folder that another run began and never finished.

    Raises:
        StorageError: it holds files that no run of qtool wrote.
    """
    ours = {".safetensors", ".partial"}
    foreign = [path for path in sorted(folder.iterdir()) if path.suffix not in ours and path.name != MANIFEST]
    known = (folder / MANIFEST).exists()
    if not known:
        foreign += sorted(folder.glob("*.safetensors"))
    if foreign:
        raise StorageError("the work folder holds something else", found=foreign[0], hint="choose another output")
    if not known or begun(folder, run):
        return
    found = _run_of(folder)
    differing = ", ".join(_difference(key, found.get(key), run[key]) for key in run if found.get(key) != run[key])
    listener(Event("quantize", 0, 0, f"{folder} was begun with another {differing}: starting anew", warning=True))
    with storage_errors(folder):
        (folder / MANIFEST).unlink()
        for path in folder.iterdir():
            path.unlink()


def _difference(key: str, there: object, here: object) -> str:
    """What a warning calls it; digests tell nobody anything."""
    readable = key in ("processor", "threads", "processes", "device", "dtype") and there is not None
    return f"{key} ({there}, now {here})" if readable else key


def identity(job: Job, calibration: str | None, content: str, edits: Sequence[Edit] = ()) -> dict[str, Any]:
    """What two runs must share for one to continue the other.

    Args:
        job: the run.
        calibration: digest of the tokens or statistics; None without data.
        content: checksum of the source, see `read_content`.
        edits: what transforms made of it.
    """
    run: dict[str, Any] = {
        "version": code_digest(),
        "model": job.plan.source_fingerprint,
        "content": content,
        "recipe": job.plan.fingerprint(),
        "device": str(job.device),
        "processor": processor(),
    }
    measured = {"dtype": str(job.dtype), "threads": torch.get_num_threads(), "processes": job.ranks.size}
    if edits:
        run |= {"transforms": digest(edits), **measured}
    if calibration is None:
        return run  # what rounds data-free treats rows alone, whatever the number of threads
    return {**run, "calibration": calibration, **measured}


def result_identity(job: Job, run: Mapping[str, Any]) -> str:
    """Hash of what two runs must share for the result of one to be that of the other: artifacts and evaluation too."""
    content = [dict(run), job.plan.recipe.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """Of the source of qtool and its plugins, so that a run never goes on with blocks that other code made."""
    digest = hashlib.sha256()
    for path in registry.sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
