"""Measures qtool as whole processes, side by side with what it is compared to, and prints the ratios.

    python -m benchmarks [--only NAME] [--work DIR] [--calibration FILE] [--evaluation FILE] [--peer PYTHON]

gptq    4 bits in groups of 64 on 32 x 512 tokens of SmolLM2-135M off any grid, against llm-compressor on these tokens
encode  every GGUF block type on real matrices with an importance matrix, against ggml's encoders
gguf    Q4_K_M from safetensors to the file without GPTQ, against conversion and ggml's encoders
mixes   GGUF files against those of llama-quantize with an importance matrix: KL divergence at the same size
scores  ways to divide a budget, at the size of one mix: costs, evolution, a policy
latency microseconds that llama.cpp takes by format: a table for budgets
budgets files whose bytes are divided by need against mixes of the same size; ten budgets against one
recipes every recipe that ships on the demo model: KL divergence and size, as in the recipes' headers
study   integers against floats on the demo model, with and without outliers: the tables and plots of docs/study.md
systems the systems of the field as recipes, each against a plain way to the same formats: the table of docs/systems.md
tables  rewrites by format, strength and calibration, methods by bits, ranks: the tables of docs/rewrites.md
cells   systems and tables at once, so that no process waits for the last of either; only by name
learned learned rounding and scales against GPTQ and AutoRound at the same bytes, several trials side by side
cast    formats without a search, on a random matrix, against copying it
stages  whole runs on the CPU by format against 4-bit integers and llm-compressor: the table of docs/methods.md
solve   GPTQ of a matrix of the demo model's size on one thread in every kind of format, against 4-bit integers
paths   GPTQ's walk along several paths, and scales by the whole local metric, on matrices of the demo model
architectures  every type of transformers' causal language models, tiny: the table of docs/architectures.md
copy    published FP8 that stays as it is, known by names only, against copying its files to the same disk
schemes what vLLM, in the Python --peer, selects for what recipes write: the table of docs/runtimes.md; only by name
stream  Q8_0 without data on a random model of 1.07 billion parameters, against copying the files; peak memory

Everything is written below DIR, and the numbers to DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import (
    architectures,
    budgets,
    cast,
    cells,
    copying,
    curves,
    encode,
    latency,
    learning,
    mixes,
    models,
    page,
    paths,
    recipes,
    schemes,
    scores,
    solve,
    stages,
    study,
    system,
    tables,
    whole,
)
from benchmarks import divided as keep
from benchmarks.measure import Cost, measure
from qtool.checkpoint.modules import modules
from qtool.checkpoint.open import open_checkpoint
from qtool.recipe.load import find_recipe
from scripts.prose import prose

QTOOL = [sys.executable, "-m", "qtool"]
SAMPLES, LENGTH = 32, 512
CHUNKS = 24


def gptq(work: Path, calibration: str, evaluation: Path, peer: Path) -> dict[str, float]:
    """Time, memory and KL divergence of both programs, and the ratios."""
    model = models.off_grid(models.checkpoint(work / "demo"), work / "off-grid")
    tokens = models.write_tokens(model, calibration, work / "tokens.safetensors", SAMPLES, LENGTH)
    ours, theirs = work / "qtool", work / "llm-compressor"
    flags = mixes.calibrated_on(calibration, SAMPLES, LENGTH)
    quantize = [*QTOOL, "quantize", model, "--recipe", "w4a16-gptq-g64", "-o", ours, "--overwrite", *flags]
    cost = measure(quantize, work / "qtool.log")
    script = Path(__file__).with_name("peer_gptq.py")
    peer_cost = measure([peer, script, model, tokens, theirs], work / "llm-compressor.log")
    kld = mixes.divergence(QTOOL, ours, model, evaluation, CHUNKS)
    peer_kld = mixes.divergence(QTOOL, theirs, model, evaluation, CHUNKS)
    return {
        **costs("qtool", cost),
        "qtool_kld": kld,
        **costs("llm-compressor", peer_cost),
        "llm-compressor_kld": peer_kld,
        "time_ratio": cost.seconds / peer_cost.seconds,
        "memory_ratio": cost.peak_bytes / peer_cost.peak_bytes,
        "kld_ratio": kld / peer_kld,
    }


def stream(work: Path) -> dict[str, float]:
    """Time against a plain copy of the input, and peak memory beside torch's own import."""
    model = models.large(models.checkpoint(work / "demo"), work / "large")
    out = work / "large-q8_0"
    cost = measure([*QTOOL, "quantize", model, "--recipe", "gguf-q8_0", "-o", out, "--overwrite"], work / "stream.log")
    torch_only = measure([sys.executable, "-c", "import torch"], work / "torch.log")
    copy = measure(["cp", "-r", model, work / "copy"], work / "copy.log")
    measure(["rm", "-r", work / "copy"], work / "copy.log")
    return {
        **costs("qtool", cost),
        "torch_import_gib": torch_only.peak_bytes / 2**30,
        "beside_torch_mb": (cost.peak_bytes - torch_only.peak_bytes) / 1e6,
        "copy_seconds": copy.seconds,
        "time_ratio": cost.seconds / copy.seconds,
    }


def encoders(work: Path, calibration: str) -> dict[str, float]:
    """Ratios of time and error to ggml's for every type and setting; prints them as a table."""
    model = models.off_grid(models.checkpoint(work / "demo"), work / "off-grid")
    print(encode.HEADER, flush=True)
    found = {}
    for line in encode.encode(QTOOL, model, work, calibration):
        print(line, flush=True)
        found |= {f"{line.label}_time_ratio": line.ours / line.ggml, f"{line.label}_error_ratio": line.error}
    return found


def files(options: argparse.Namespace) -> dict[str, float]:
    """KL divergence of GGUF files over that of llama-quantize's; prints them as a table."""
    work = options.work
    demo = models.checkpoint(work / "demo")
    model = models.widened(models.off_grid(demo, work / "off-grid"), work / "wide")
    texts = {"evaluation": options.evaluation}
    if options.prose != options.evaluation:
        texts["prose"] = options.prose
    print(mixes.HEADER, flush=True)
    found = {}
    for row in mixes.mixes(QTOOL, model, work, options.calibration, texts, CHUNKS):
        print(row, flush=True)
        found |= {f"{row.mix}_{row.text}_{way}": value for way, value in zip(row._fields[3:], row[3:], strict=True)}
    return found


def divided(options: argparse.Namespace) -> dict[str, float]:
    """KL divergence of files by budget over that of mixes as large, as a table; seconds of one budget and of ten."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    model = models.widened(narrow, options.work / "wide")
    found = {} if options.mix else dict(budgets.another(QTOOL, model, options.work, options.calibration))
    print(*(f"{key} {value:.1f}" for key, value in found.items()), budgets.HEADER, sep="\n", flush=True)
    texts = {"evaluation": options.evaluation, "prose": options.prose}
    place = budgets.Place(options.device, options.processes)
    wanted = options.mix or budgets.MIXES
    for row in budgets.siblings(QTOOL, model, options.work, options.calibration, texts, options.chunks, place, wanted):
        print(row, flush=True)
        if options.write_page:
            keep.keep_row(row)
        found |= {f"{row.mix}_{row.text}_{key}": value for key, value in zip(row._fields[2:], row[2:], strict=True)}
        found[f"{row.mix}_{row.text}_ratio"] = row.ratio
    return found


def decided(options: argparse.Namespace) -> dict[str, float]:
    """KL divergence of plans of one size by how they were found; prints them as a table."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    model, found = models.widened(narrow, options.work / "wide"), {}
    print(scores.HEADER, flush=True)
    lines = []
    for line in scores.ways(model, options.calibration, options.device, options.generations):
        print(line, flush=True)
        lines.append(line)
        found[f"{line.way}_kld"] = line.kld
    if options.write_page:
        keep.keep_ways(lines)
    return found


def timed(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds by format; writes them as a table that a budget takes."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    model = models.widened(narrow, options.work / "wide")
    weights, found = sum(math.prod(m.shape) for m in modules(open_checkpoint(str(model)))), {}
    for label, microseconds in latency.times(QTOOL, model, options.work, weights):
        print(f"{label}: {microseconds:.1f}", flush=True)
        found[label] = microseconds
    table = options.work / "latency.yaml"
    table.write_text("".join(f"{label}: {x:.2f}\n" for label, x in found.items()), encoding="utf-8")
    return found


def shipped(options: argparse.Namespace) -> dict[str, float]:
    """KL divergence and size of the demo model by every recipe that ships; prints them as a table."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    found, candidates = {}, [narrow, models.widened(narrow, options.work / "wide")]
    for name, kld, megabytes in recipes.qualities(QTOOL, candidates, options.work, options.prose, CHUNKS):
        print(f"{name:28} {megabytes:8.1f} MB {kld:8.4f}", flush=True)
        found |= {f"{name}_kld": kld, f"{name}_mb": megabytes}
        if options.write_headers and not name.endswith("-best"):  # see benchmarks.learning
            recipe = find_recipe(name)
            recipe.write_text(recipes.with_quality(recipe.read_text(encoding="utf-8"), kld), encoding="utf-8")
    return found


def studied(options: argparse.Namespace) -> dict[str, float]:
    """KL divergence of integers and floats; goes on where an earlier run was cut."""
    found = study.study(options.work, options.prose, options.chunks, options.device)
    if options.write_page:
        page.write(found)
    return {key: value for key, value in found.items() if isinstance(value, float)}


def compared(options: argparse.Namespace) -> dict[str, float]:
    """Divergences of systems, and of what they are compared with; goes on where an earlier run was cut."""
    return measured(system.cells(options.system), options)


def tabled(options: argparse.Namespace, *others: cells.Cell) -> dict[str, float]:
    """Divergences of recipes in the tables of docs/rewrites.md; goes on where one was cut. Draws its plots."""
    try:
        return measured([*others, *tables.cells(options.table)], options)
    finally:
        curves.write()


def measured(wanted: list[cells.Cell], options: argparse.Namespace) -> dict[str, float]:
    """Divergences of cells; prints them, and at the end raises SystemExit if one failed."""
    wanted = sorted(cells.missing(wanted), key=cells.trains)  # what trains takes longest, and a device best
    if options.last_first:
        wanted.reverse()
    cells.prepare(options.work, wanted)
    run = partial(cells.outcome, work=options.work, device=options.device)
    found, failed, begun = dict[str, float](), list[str](), time.perf_counter()
    for cell, outcome in cells.measure(wanted, run, cells.processes(options.processes)):
        if isinstance(outcome, str):
            failed.append(f"{cell.key}: {outcome}")
            print(f"failed   {failed[-1]}", flush=True)
            continue
        print(f"{outcome.kld:8.4f} {cell.key} ({time.perf_counter() - begun:.0f} s)", flush=True)
        found[cell.key] = outcome.kld
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(found) + len(failed)} failed:", *failed]))
    return found


def trained(options: argparse.Namespace) -> dict[str, float]:
    """KL divergence of what learns, on text like what it learned from and on other prose; learned.json says more."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    models.widened(narrow, options.work / "wide")
    return learning.measured(options, narrow)


def uncalibrated() -> dict[str, float]:
    """Time of formats without a search over that of a copy."""
    return {f"{label}_over_copy": seconds / copy for label, seconds, copy in cast.casts()}


def solvers() -> dict[str, float]:
    """Processor time of formats over that of 4-bit integers, and the error of outputs; prints them as a table."""
    print(solve.HEADER, flush=True)
    found = {}
    for line in solve.lines():
        print(line, flush=True)
        found |= {f"{line.label}_time_ratio": line.ratio, f"{line.label}_db": line.decibels}
    return found


def staged(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of whole runs by format, and over those of 4-bit integers and of the peer; prints them as a table."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    model = models.widened(narrow, options.work / "wide")
    peer = options.peer if options.peer.exists() else None
    return stages.measured(model, options.work, options.calibration, peer, options.format, options.write_page)


def pathways(options: argparse.Namespace) -> dict[str, float]:
    """Errors of outputs by other walks over those of GPTQ's, refined; prints them as a table."""
    model, found = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid"), {}
    print(paths.HEADER, flush=True)
    for line in paths.lines(model):
        print(line, flush=True)
        found[f"{line.matrix} {line.label} {line.way}"] = line.refined
    return found


def costs(name: str, cost: Cost) -> dict[str, float]:
    """A cost as named numbers."""
    return {f"{name}_seconds": cost.seconds, f"{name}_peak_gib": cost.peak_bytes / 2**30}


def gguf(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a whole run to Q4_K_M and of llama.cpp's two steps."""
    narrow = models.off_grid(models.checkpoint(options.work / "demo"), options.work / "off-grid")
    model = models.widened(narrow, options.work / "wide")
    return dict(whole.whole(QTOOL, model, options.work, options.calibration))


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "gptq": lambda options: gptq(options.work, options.calibration, options.evaluation, options.peer),
    "encode": lambda options: encoders(options.work, options.calibration),
    "gguf": gguf,
    "mixes": files,
    "budgets": divided,
    "latency": timed,
    "scores": decided,
    "recipes": shipped,
    "study": studied,
    "systems": compared,
    "tables": tabled,
    "cells": lambda options: tabled(options, *system.cells(options.system)),
    "learned": trained,
    "cast": lambda _: uncalibrated(),
    "solve": lambda _: solvers(),
    "stages": staged,
    "paths": pathways,
    "architectures": lambda options: architectures.run(
        options.work, options.kind, options.processes, options.write_page
    ),
    "copy": lambda options: copying.against_a_copy(QTOOL, options.work, options.gigabytes * 1e9, options.processes),
    "stream": lambda options: stream(options.work),
    "schemes": lambda options: {"written": schemes.ask(options.peer)},
}
BY_NAME = ("schemes", "cells")
"""What runs only if it is asked for."""


def main() -> None:
    """Runs the wanted benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(BENCHMARKS), help="default: all")
    parser.add_argument("--work", type=Path, default=Path("demo/bench"))
    parser.add_argument("--calibration", default="builtin", help="a recipe's calibration.data")
    parser.add_argument("--evaluation", type=Path, help="UTF-8 text; default: docstrings of the standard library")
    parser.add_argument("--peer", type=Path, default=Path(".venv-peer/bin/python"), help="Python with llm-compressor")
    parser.add_argument("--write-headers", action="store_true", help="recipes: write the lines # Quality: anew")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="study and later: where")
    parser.add_argument("--chunks", type=int, default=12, help="study, budgets, learned: of each text")
    parser.add_argument("--write-page", action="store_true", help="write the page or table in docs/ anew")
    parser.add_argument(
        "--processes", type=int, default=2, help="side by side: architectures, budgets, copy, learned, systems, tables"
    )
    parser.add_argument("--gigabytes", type=float, default=12, help="copy: of the checkpoint")
    parser.add_argument("--kind", action="append", default=[], help="architectures: this type, and others given so")
    parser.add_argument(
        "--mix", action="append", default=[], choices=budgets.MIXES, help="budgets: this mix, no seconds"
    )
    parser.add_argument("--generations", type=int, default=24, help="scores: plans that evolution and policies measure")
    parser.add_argument("--system", action="append", default=[], help="systems: this one, and others given so")
    parser.add_argument("--last-first", action="store_true", help="systems, tables, cells: beside a run of the same")
    parser.add_argument("--table", action="append", default=[], choices=list(tables.TABLES), help="tables: this one")
    parser.add_argument("--format", action="append", default=[], help="stages: this one, and others given so")
    parser.add_argument("--trial", action="append", default=[], help="learned: names that begin so, in this order")
    parser.add_argument("--samples", type=int, default=128, help="learned: of the calibration, of 512 tokens")
    parser.add_argument("--seconds", type=float, default=86400, help="learned: when to stop")
    parser.add_argument("--with-peer", action="store_true", help="learned: AutoRound as well, of the Python --peer")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.work, options.prose = work, work / "prose.txt"
    if not options.prose.exists():
        options.prose.write_text(prose(), encoding="utf-8")
    options.evaluation = options.evaluation or options.prose
    results = {}
    for name in [options.only] if options.only else [name for name in BENCHMARKS if name not in BY_NAME]:
        found = BENCHMARKS[name](options)
        results[name] = {key: round(value, 4) for key, value in found.items()}
        print(name, *(f"{key:>24} {value:.3f}" for key, value in found.items()), sep="\n")
        (work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
