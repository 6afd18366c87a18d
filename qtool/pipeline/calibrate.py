"""Measures the inputs of a model's layers once, for many recipes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.store import write_stats
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, modules
from qtool.errors import StorageError
from qtool.pipeline.card import model_name
from qtool.pipeline.events import Event, Listener, remarks, silent
from qtool.pipeline.importance import write_importance
from qtool.pipeline.measured import kind_of
from qtool.pipeline.prepare import prepare
from qtool.recipe.schema import Recipe
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.store.files import check_file, new_file
from qtool.store.names import output_path

CHANNELS = frozenset({Channels})


@dataclass(frozen=True)
class CalibrateOptions:
    """What `qtool calibrate` was asked to do.

    Attributes:
        model, recipe, overrides, seed: see `prepare`; of the recipe, only the calibration matters.
        out: file of the result; an importance matrix of llama.cpp if its name ends in .gguf.
        device, dtype: "auto", or where and in which type to compute.
        overwrite: replace an earlier file.
    """

    model: str | Checkpoint
    recipe: str | Recipe
    out: Path
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    seed: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Measured:
    """What was written: number of inputs, of tokens that each saw, and bytes."""

    inputs: int
    tokens: int
    nbytes: int


def run(options: CalibrateOptions, listener: Listener = silent) -> Measured:
    """Runs the calibration tokens through the unquantized model, block by block, and writes the statistics.

    Raises:
        QtoolError: of most kinds; see `prepare` and `load_tokens`.
    """
    options = replace(options, out=output_path(options.out, options.model))
    if os.path.exists(options.out) and kind_of(options.out) is None:
        raise StorageError(f"{options.out} holds something else", hint="choose another name")
    if os.path.exists(options.out) and not options.overwrite:
        raise StorageError(f"{options.out} exists", hint="pass --overwrite to replace it, or choose another name")
    check_file(options.out)
    o = options
    job = prepare(o.model, o.recipe, o.overrides, o.seed, device=o.device, dtype=o.dtype)
    calibration = job.plan.recipe.calibration
    walker = Walker(job.original, job.device, job.dtype, calibration.experts == "all")
    tokens = load_tokens(calibration, job.original, remarks(listener, "calibrate"))
    stats = measure(walker, walker.embed(tokens), listener)
    about = {
        "model": model_name(job.original.source),
        "fingerprint": job.plan.source_fingerprint,
        "calibration": {**calibration.model_dump(mode="json"), "tokens": tokens.numel()},
    }
    with new_file(options.out) as partial:
        if options.out.suffix == ".gguf":
            write_importance(partial, stats, job.original, calibration)
        else:
            write_stats(partial, stats, about)
    return Measured(len(stats), tokens.numel(), options.out.stat().st_size)


def measure(walker: Walker, hidden: Hidden, listener: Listener) -> dict[str, InputStats]:
    """Compact statistics of every input of every block, and of the output layer if it is a matrix of its own.

    Inputs that no token reached, of experts, are left out.
    """
    stats: dict[str, InputStats] = {}
    blocks = len(walker.blocks)
    listener(Event("calibrate", 0, blocks))
    for i in range(blocks):
        found = walker.collect(walker.load_block(i), i, hidden, CHANNELS)
        stats |= {reads: measured for reads, measured in found.items() if measured.tokens}
        listener(Event("calibrate", i + 1, blocks, f"block {i}"))
    heads = [m.reads for m in modules(walker.checkpoint) if m.role == "head"]
    return stats | {reads: walker.collect_head(hidden, CHANNELS) for reads in heads}
