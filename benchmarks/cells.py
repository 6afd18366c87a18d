"""Recipes on variants of the demo model, each run once and kept: what docs/systems.md and docs/rewrites.md show.

A cell is a recipe that ships, with something set in it, on a variant of the model. What came out is kept in
`benchmarks/measured.json` by what was run, so a run that was cut off goes on, and cells that tables share are run once.
Several cells may run side by side, as processes; one that fails is told, and the others go on. So may several programs,
one on a device and one beside it: they keep what comes out in one file.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, cached_property
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from benchmarks import models
from benchmarks.study import Bench
from qtool.checkpoint._base import Checkpoint
from qtool.evaluate.divergence import Scores
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Recipe
from qtool.store.files import new_file
from scripts import prose

KEPT = Path(__file__).with_name("measured.json")
SAMPLES, LENGTH = 16, 512
"""Calibration of every recipe that measures something and is not told otherwise."""
CHUNKS, CONTEXT = 8, 512
"""Of each text that divergences are measured on; the second half of every chunk is scored."""
CONDITIONS = {"samples": SAMPLES, "length": LENGTH, "chunks": CHUNKS, "context": CONTEXT}
EVALUATED = {"prose.txt": prose.prose, "code.txt": prose.code}
CALIBRATED = {"other-prose.txt": prose.other_prose, "other-code.txt": prose.other_code, "words.txt": prose.words}
"""Texts that are made on the spot, by the names of their files."""
Variant = Literal["off-grid", "outliers", "ternary", "ternary-groups", "two-bit", "phases", "experts"]
"""SmolLM2-135M off any grid; with outliers in its activations; with weights that are on a grid; as a mixture."""


class Part(BaseModel):
    """Part of a file: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Way(Part):
    """A recipe that ships, with what is set in it; `TEXTS/` is where texts are."""

    recipe: str
    set: tuple[str, ...] = ()

    def loaded(self, texts: Path = Path()) -> Recipe:
        """The recipe as it is run. Raises RecipeError."""
        defaults = ["calibration.data=builtin", f"calibration.samples={SAMPLES}", f"calibration.length={LENGTH}"]
        return load_recipe(self.recipe, [*defaults, *(text.replace("TEXTS/", f"{texts}/") for text in self.set)])

    def __str__(self) -> str:
        options = ", ".join(f"`{text}`" for text in self.set)
        return f"[{self.recipe}](../recipes/{self.recipe}.yaml)" + (f" with {options}" if options else "")


class Cell(NamedTuple):
    """One model to measure.

    Attributes:
        way: the recipe.
        variant: of the model.
        code: whether it is evaluated on source code as well, which takes as long again.
    """

    way: Way
    variant: Variant = "off-grid"
    code: bool = False

    @property
    def key(self) -> str:
        """Where its outcome is kept."""
        return " ".join((self.variant, self.way.recipe, *self.way.set))

    def among(self, known: Mapping[str, Measured]) -> bool:
        """Whether all that is asked was measured."""
        return self.key in known and not (self.code and known[self.key].code is None)


class Measured(Part):
    """What a run gave.

    Attributes:
        kld: mean KL divergence from the model before on prose, nats per token.
        megabytes: of the artifact's tensors.
        carrier: the artifact, read back and compared.
        code: divergence on source code; None: nobody asked.
    """

    kld: float
    megabytes: float
    carrier: str
    code: float | None = None


def kept() -> dict[str, Any]:
    """The file as it is, if it is of the present conditions."""
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return found if found.get("conditions") == CONDITIONS else {}


def known() -> dict[str, Measured]:
    """What was measured under the present conditions, by key."""
    return {k: Measured(**v) for k, v in kept().get("cells", {}).items()}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other program writes into a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def keep(key: str, measured: Measured) -> None:
    """Adds an outcome, with four digits; what was measured under other conditions goes."""
    with alone(KEPT.parent):
        write(kept().get("texts", {}), known() | {key: measured})


def write(texts: Mapping[str, Mapping[str, str]], cells: Mapping[str, Measured]) -> None:
    """The file, of all cells; texts: what `digests` says, by the version of Python that they come with."""
    values = {k: {n: rounded(v) for n, v in cells[k].model_dump(exclude_none=True).items()} for k in sorted(cells)}
    with new_file(KEPT) as partial:
        text = json.dumps({"conditions": CONDITIONS, "texts": texts, "cells": values}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """A number with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Demo:
    """Runs recipes on variants of the demo model.

    Args:
        work: for models, texts and results.
        device: where.
        out: folder below `work` for what is quantized.
    """

    def __init__(self, work: Path, device: str = "cpu", out: str = "out") -> None:
        self.work, self.device, self.out = work, device, work / out
        self.benches: dict[Path, tuple[Corpus, Corpus]] = {}

    def __call__(self, cell: Cell) -> Measured:
        """Quantizes, writes the artifact, which is read back, and evaluates that."""
        path = models.variant(self.work, cell.variant)
        recipe = cell.way.loaded(self.work)
        report = run(QuantizeOptions(str(path), recipe, self.out, overwrite=True, device=self.device))
        artifact = report.artifacts[0]
        if not artifact.verified:
            raise AssertionError(f"{cell.way.recipe}: {artifact.kind} was not read back")
        nbytes = sum(f.nbytes for f in artifact.files if f.name.endswith((".gguf", ".safetensors")))
        model = open_artifact(str(self.out))
        prose, source = self.corpora(path)
        kld, code = prose.divergence(model), source.divergence(model) if cell.code else None
        return Measured(kld=kld, code=code, megabytes=nbytes / 1e6, carrier=artifact.kind)

    def corpora(self, path: Path) -> tuple[Corpus, Corpus]:
        """The texts that a model is evaluated on."""
        if path not in self.benches:
            device = torch.device(self.device)
            benches = (Bench(path, self.work / name, CHUNKS, device, self.out, CONTEXT) for name in EVALUATED)
            first, second = map(Corpus, benches)
            self.benches[path] = first, second
        return self.benches[path]


class Corpus:
    """A text with what the model before makes of it.

    Args:
        bench: model and text.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @cached_property
    def baseline(self) -> list[torch.Tensor]:
        """Logits of the model before, float32 [T, V] for each chunk."""
        logits = self.bench.logits(self.bench.checkpoint)
        return [logits(s) for s in range(CHUNKS)]

    def divergence(self, model: Checkpoint) -> float:
        """Mean KL divergence, nats per token."""
        logits, scores = self.bench.logits(model), Scores()
        for s in range(CHUNKS):
            scores.add(logits(s), self.bench.tokens[s, self.bench.first + 1 :], self.baseline[s])
        return scores.summary()["kld_mean"]


def digests(work: Path) -> dict[str, str]:
    """First digits of SHA-256 of texts to evaluate on and to calibrate with; each version of Python has others."""
    texts = {name: (work / name).read_text(encoding="utf-8") for name in EVALUATED}
    texts["builtin"] = "".join(topics[name] for name in sorted(topics))
    return {name: sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def refuse_other_texts(work: Path) -> None:
    """Raises SystemExit: cells were measured with texts of another Python. The first run says which these are."""
    with alone(KEPT.parent):
        found, own = kept().get("texts", {}), digests(work)
        if found and own not in found.values():
            wrong = f"{KEPT.name} was measured with texts of Python {' and '.join(found)}, and these are others"
            raise SystemExit(f"{wrong}: run it with that one, or remove the file to measure everything anew")
        if not found:
            write({platform.python_version(): own}, known())


def prepare(work: Path, cells: Iterable[Cell]) -> None:
    """Makes the models of cells, and all texts. Raises SystemExit: see `refuse_other_texts`."""
    with alone(work):
        for variant in sorted({one.variant for one in cells}):
            models.variant(work, variant)
        for name, text in (EVALUATED | CALIBRATED).items():
            if not (work / name).exists():
                (work / name).write_text(text(), encoding="utf-8")
    refuse_other_texts(work)


def measure(
    wanted: Iterable[Cell], run: Callable[[Cell], Measured], pool: Executor
) -> Iterator[tuple[Cell, Measured | str]]:
    """Measures cells that are not known, and keeps each.

    Args:
        wanted: in this order.
        run: measures one.
        pool: where they run.

    Yields:
        What was run, and what came out, or why nothing did.
    """
    futures = {pool.submit(run, one): one for one in missing(wanted)}
    for future in as_completed(futures):
        one, error = futures[future], future.exception()
        if error is None:
            keep(one.key, future.result())
        yield one, f"{type(error).__name__}: {error}" if error else future.result()


def missing(wanted: Iterable[Cell]) -> list[Cell]:
    """Those that are not known, each once."""
    found = known()
    return list({one.key: one for one in wanted if not one.among(found)}.values())


def processes(jobs: int) -> Executor:
    """So many processes, which share the processor's cores, or have as many as the environment says."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    os.environ |= {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}  # for the processes that are started
    return ProcessPoolExecutor(jobs, get_context("spawn"))


def trains(one: Cell) -> int:
    """How much of a recipe is training: 2 the whole model, 1 block by block, 0 nothing."""
    text = one.way.loaded().model_dump_json()
    return 2 if "distill" in text else int("learned" in text)


@cache
def demo(work: Path, device: str) -> Demo:
    """What measures cells in this process."""
    return Demo(work, device, f"out-{os.getpid()}")


def outcome(one: Cell, work: Path, device: str) -> Measured:
    """Measures a cell in a process that is one of several, unless another program did; tells when it begins."""
    found = known()
    if one.among(found):
        return found[one.key]
    print(f"begins   {one.key}", file=sys.stderr, flush=True)
    return demo(work, device)(one)
