"""The systems of the field as recipes, and what each is worth on the demo model: what docs/systems.md shows.

A system is one file of `benchmarks/systems/`: what it is called and where it is described, the recipe of it that ships,
what its paper promises, and what it is compared with. The last key of the file, `measured`, is written here. What is
compared with is measured once for all systems, and kept in the work folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from benchmarks.study import Bench
from qtool.evaluate.divergence import Scores
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Recipe

FOLDER = Path(__file__).with_name("systems")
SAMPLES, LENGTH = 8, 512
"""Calibration of every recipe that measures something."""
CHUNKS, CONTEXT = 2, 512
"""Text that divergences are measured on."""
Variant = Literal["off-grid", "outliers", "ternary", "two-bit"]
"""SmolLM2-135M off any grid; the same with outliers in its activations; the same with weights that are on a grid."""


class Part(BaseModel):
    """Part of a system's file: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Way(Part):
    """A recipe that ships, with what is set in it."""

    recipe: str
    set: tuple[str, ...] = ()

    def loaded(self) -> Recipe:
        """The recipe as it is run. Raises RecipeError."""
        return load_recipe(self.recipe, [f"calibration.samples={SAMPLES}", f"calibration.length={LENGTH}", *self.set])

    def __str__(self) -> str:
        options = ", ".join(f"`{text}`" for text in self.set)
        return f"[{self.recipe}](../recipes/{self.recipe}.yaml)" + (f" with {options}" if options else "")


class Measured(Part):
    """What a run gave.

    Attributes:
        kld: mean KL divergence from the model before, nats per token.
        megabytes: of the artifact's tensors.
        carrier: the artifact, read back and compared.
    """

    kld: float
    megabytes: float
    carrier: str


class Result(Measured):
    """What a system gave, and what it was compared with."""

    against: Measured


class System(Way):
    """A system of the field.

    Attributes:
        title: what it is called.
        paper: URL.
        what: what it is made of here, one sentence.
        against: the plain way to the same formats.
        model: what it is measured on.
        claim: what the paper says comes of it, in our words.
        ratio: seen if the divergence is below this share of the other's.
        note: what else has to be said of the outcome.
        measured: what came out; None: nobody looked yet.
    """

    title: str
    paper: str
    what: str
    against: Way
    model: Variant = "off-grid"
    claim: str
    ratio: float = 1.0
    note: str = ""
    measured: Result | None = None

    @property
    def seen(self) -> str:
        """Whether the paper's direction is seen here."""
        if self.measured is None:
            return "not measured"
        share = self.measured.kld / max(self.measured.against.kld, 1e-9)
        return f"{'yes' if share < self.ratio else 'no'} ({share:.2f})"


def systems() -> dict[str, System]:
    """All of them by name, in the order of their titles."""
    found = {path.stem: read(path) for path in FOLDER.glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: item[1].title.lower()))


def read(path: Path) -> System:
    """One file. Raises ValueError: it does not say what a system has to say."""
    return System.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


HEADER = ("system", "recipe", "carrier", "MB", "KL divergence", "against", "what it is, what its paper says", "seen")


def rows() -> Iterator[tuple[str, ...]]:
    """What the table of docs/systems.md says."""
    for system in systems().values():
        found = system.measured
        name = f"[{system.title}]({system.paper})"
        sizes = (found.carrier, f"{found.megabytes:.1f}", f"{found.kld:.4g}") if found else ("", "", "")
        rival = f"{found.against.kld:.4g} ({found.against.megabytes:.1f} MB), {system.against}" if found else ""
        what = f"{system.what} {system.claim}" + (f" {system.note}" if system.note else "")
        yield name, str(system), *sizes, rival, what, system.seen


def measure_all(
    measure: Callable[[Way, Variant], Measured], kept: Path, names: Sequence[str] = ()
) -> Iterator[tuple[str, System]]:
    """Measures systems, and writes into each one's file what came out.

    Args:
        measure: measures a recipe on a model.
        kept: file where what systems are compared with is kept.
        names: of systems; empty: all.
    """
    for name, system in systems().items():
        if names and name not in names:
            continue
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        key = " ".join((system.model, system.against.recipe, *system.against.set))
        if key not in known:
            known[key] = measure(system.against, system.model).model_dump()
            kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
        found = measure(system, system.model)
        result = Result(**found.model_dump(), against=Measured(**known[key]))
        path = FOLDER / f"{name}.yaml"
        path.write_text(with_measured(path.read_text(encoding="utf-8"), result), encoding="utf-8")
        yield name, read(path)


def with_measured(text: str, result: Result) -> str:
    """A system's file with what was measured as its last key."""
    head = text.partition("\nmeasured:")[0].rstrip("\n")
    return f"{head}\n{yaml.safe_dump({'measured': rounded(result.model_dump())}, sort_keys=False)}"


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers with four digits."""
    return {
        key: rounded(value) if isinstance(value, dict) else float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in values.items()
    }


class Demo:
    """Runs recipes on variants of the demo model.

    Args:
        model: gives the folder of a variant.
        text: to evaluate on.
        work: for results.
        device: where.
    """

    def __init__(self, model: Callable[[Variant], Path], text: Path, work: Path, device: str = "cpu") -> None:
        self.model, self.text, self.work, self.device = cache(model), text, work, device
        self.benches: dict[Variant, Bench] = {}

    def bench(self, variant: Variant) -> Bench:
        """A variant with its logits, which are computed once."""
        if variant not in self.benches:
            path, device = self.model(variant), torch.device(self.device)
            self.benches[variant] = Bench(path, self.text, CHUNKS, device, self.work, CONTEXT)
        return self.benches[variant]

    def __call__(self, way: Way, variant: Variant) -> Measured:
        """Quantizes, writes the artifact, which is read back, and evaluates that."""
        out, path = self.work / "out", str(self.model(variant))
        report = run(QuantizeOptions(path, way.loaded(), out, overwrite=True, device=self.device))
        artifact, bench = report.artifacts[0], self.bench(variant)
        if not artifact.verified:
            raise AssertionError(f"{way.recipe}: {artifact.kind} was not read back")
        logits, scores = bench.logits(open_artifact(str(out))), Scores()
        for s in range(CHUNKS):
            scores.add(logits(s), bench.tokens[s, bench.first + 1 :], bench.baseline(s))
        nbytes = sum(f.nbytes for f in artifact.files if f.name.endswith((".gguf", ".safetensors")))
        return Measured(kld=scores.summary()["kld_mean"], megabytes=nbytes / 1e6, carrier=artifact.kind)
