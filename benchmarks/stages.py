"""Whole runs of the program on the CPU by format: seconds over those of 4-bit integers, and over llm-compressor's.

Every run is a process of its own, artifact and report included, one after the other on all cores, GPTQ on the same
32 x 512 tokens: of the demo model off any grid, widened so that rows are whole blocks of 256 and no format falls back
to another. Kernels are compiled before, on its first block alone. The peer's run is 4-bit integers on the same model
and tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from benchmarks import models
from benchmarks.measure import Cost, measure
from qtool.report.model import Report
from qtool.report.render import read_report

KEPT = Path(__file__).with_name("stages.json")
SAMPLES, LENGTH = 32, 512
FORMATS = ("int4-g64", "mxfp4", "nvfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs", "iq3_xxs", "iq3_s")
"""The first one is what the others are compared with; it is plain GPTQ, as its recipes have it."""
PEER = "llm-compressor"
TITLES = ("format", "seconds", "quantizing", "solving", "GiB", "output dB", "over int4-g64", f"over {PEER}")
RECIPE = """recipe: 1
name: {label}
calibration: {{data: {data}, samples: {samples}, length: {length}}}
layers:
  - {{match: lm_head, keep: true}}
  - {{match: "*", weights: {label}, method: {{gptq: {{rounds: {rounds}}}}}}}
export: [{{to: {artifact}}}]
"""
GPU_FORMATS = {"int4-g64", "mxfp4", "nvfp4"}
"""Those that go to compressed-tensors, as the peer's; the others to GGUF."""


class Line(NamedTuple):
    """One run.

    Attributes:
        label: of the format; or the peer's name.
        seconds: of the whole process.
        stage: of these the stage that measures and solves; 0 for the peer, which does not tell.
        solving: of these what matrices took, as the report sums them up.
        peak_bytes: of resident memory.
        decibels: mean over matrices, of signal over error of their outputs.
        ratio: of `stage` over that of the first format.
        peer_ratio: of `seconds` over the peer's; 0 where that was not run.
    """

    label: str
    seconds: float
    stage: float = 0.0
    solving: float = 0.0
    peak_bytes: int = 0
    decibels: float = 0.0
    ratio: float = 0.0
    peer_ratio: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """The line of a table, empty where something is not known."""
        times = f"{self.seconds:.1f}", *(f"{x:.1f}" if x else "" for x in (self.stage, self.solving))
        ratios = (f"{x:.2f}" if x else "" for x in (self.decibels, self.ratio, self.peer_ratio))
        return (self.label, *times, f"{self.peak_bytes / 2**30:.2f}", *ratios)

    def __str__(self) -> str:
        return spread(self.cells())


def spread(cells: Sequence[str]) -> str:
    """Cells of a line below each other's titles."""
    return " ".join(f"{cell:>{max(len(title), 8)}}" for cell, title in zip(cells, TITLES, strict=True))


def first_block(source: Path, out: Path) -> Path:
    """A checkpoint of one shard without all decoder blocks but the first."""
    if (out / "model.safetensors").exists():
        return out
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 1}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    kept = {
        n: t for n, t in load_file(source / "model.safetensors").items() if ".layers." not in n or ".layers.0." in n
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def run(qtool: Sequence[str], model: Path, work: Path, label: str, data: str) -> tuple[Cost, Report]:
    """Quantizes a model in a format, compiled kernels at hand or not."""
    recipe, out = work / f"stages-{label}.yaml", work / f"stages-{label}"
    rounds = 0 if label == FORMATS[0] else 1
    artifact = "compressed-tensors" if label in GPU_FORMATS else "gguf"
    settings = {"data": json.dumps(data), "samples": SAMPLES, "length": LENGTH, "rounds": rounds, "artifact": artifact}
    recipe.write_text(RECIPE.format(label=label, **settings), encoding="utf-8")
    command: list[str | Path] = [*qtool, "quantize", model, "-r", recipe, "-o", out, "--overwrite"]
    return measure(command, work / "stages.log"), read_report(out / "report.json")


def line(label: str, cost: Cost, report: Report, first: float | None, peer: float | None) -> Line:
    """What a run took.

    Args:
        label: of the format.
        cost: of the process.
        report: that it wrote.
        first: seconds of the first format's stage; None: this is the first.
        peer: seconds of the peer's process; None: it was not run.
    """
    (stage,) = (entry.seconds for entry in report.stages if entry.name == "quantize")
    errors = [e.output_error_db for e in report.layers if e.output_error_db is not None]
    solving = sum(e.seconds for e in report.layers)
    ratios = stage / (first or stage), cost.seconds / peer if peer else 0.0
    return Line(label, cost.seconds, stage, solving, cost.peak_bytes, sum(errors) / len(errors), *ratios)


def lines(
    qtool: Sequence[str], model: Path, work: Path, data: str, peer: Path | None, labels: Sequence[str] = ()
) -> Iterator[Line]:
    """The peer, if there is one, then every format; the first one is always among them.

    Args:
        qtool: how the program is called.
        model: the wide checkpoint.
        work: where files go.
        data: what is calibrated with.
        peer: Python of an environment with llm-compressor.
        labels: of some formats; default: all.
    """
    theirs = None
    if peer:
        tokens = models.write_tokens(model, data, work / "stages-tokens.safetensors", SAMPLES, LENGTH)
        script = Path(__file__).with_name("peer_gptq.py")
        cost = measure([peer, script, model, tokens, work / "stages-peer"], work / "stages-peer.log")
        theirs = cost.seconds
        yield Line(PEER, cost.seconds, peak_bytes=cost.peak_bytes, peer_ratio=1.0)
    short, first = first_block(model, work / "first-block"), None
    for label in dict.fromkeys((FORMATS[0], *(labels or FORMATS))):
        run(qtool, short, work, label, data)
        found = line(label, *run(qtool, model, work, label, data), first, theirs)
        first = first or found.stage
        yield found


def measured(
    model: Path, work: Path, data: str, peer: Path | None, labels: Sequence[str], write_page: bool
) -> dict[str, float]:
    """Runs all, prints them as a table, and keeps it for the page if wanted; see `lines`."""
    print(spread(TITLES), flush=True)
    found = []
    for each in lines([sys.executable, "-m", "qtool"], model, work, data, peer, labels):
        print(each, flush=True)
        found.append(each)
    if write_page:
        keep(found)
    return {f"{x.label}_{key}": getattr(x, key) for x in found for key in ("seconds", "ratio", "peer_ratio")}


def keep(found: Sequence[Line]) -> None:
    """Replaces the lines that the page shows: side by side in one run, or they say nothing of each other."""
    KEPT.write_text(json.dumps([list(x) for x in found], indent=1) + "\n", encoding="utf-8")


def rows() -> Iterator[tuple[str, ...]]:
    """Lines of the page's table."""
    known: list[list[Any]] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    for one in known:
        yield Line(*one).cells()
