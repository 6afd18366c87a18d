"""Measures the inputs of a model's layers once, for many recipes."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.shards import StatsWriter, nbytes
from qtool.calibrate.store import write_stats
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, Module
from qtool.checkpoint.modules import modules
from qtool.errors import StorageError
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.card import model_name
from qtool.pipeline.content import refuse_changed
from qtool.pipeline.events import Event, Listener, remarks, silent
from qtool.pipeline.importance import write_importance
from qtool.pipeline.measured import kind_of
from qtool.pipeline.prepare import Job, prepare
from qtool.pipeline.stored import ORIGINAL
from qtool.pipeline.tokens import tokens_of
from qtool.pipeline.weigh import Weights, groups_of, token_weights
from qtool.recipe.schema import Recipe
from qtool.report.units import size
from qtool.stats._base import InputStats, Statistic, in_order
from qtool.stats.channels import Channels
from qtool.store.files import check_file, check_free, new_file, new_folder
from qtool.store.names import output_path

CHANNELS = frozenset({Channels})


@dataclass(frozen=True)
class CalibrateOptions:
    """What `qtool calibrate` was asked to do.

    Attributes:
        model, recipe, overrides, seed: see `prepare`; the recipe's methods say what is measured beside channels.
        out: of the result: a file, or a folder if it holds more than sums and ranges of channels; an importance matrix
            of llama.cpp if its name ends in .gguf.
        device, dtype: "auto", or where and in which type to compute.
        overwrite: replace an earlier file.
        ranks: who measures together; all are asked for the same.
    """

    model: str | Checkpoint
    recipe: str | Recipe
    out: Path
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    seed: int | None = None
    overwrite: bool = False
    ranks: Ranks = ALONE


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
    o, out, ranks = options, options.out, options.ranks
    if ranks.first:
        check(out, options.overwrite)
    job = prepare(o.model, o.recipe, o.overrides, o.seed, device=o.device, dtype=o.dtype, ranks=ranks)
    needs = kept(job, out, listener)
    in_file = out.suffix == ".gguf" or (needs == CHANNELS and not job.plan.recipe.calibration.token_weights)
    if ranks.first:
        check_file(out) if in_file else check_free(out, options.overwrite)
        refuse_changed(job.original.source, listener)
    calibration = job.plan.recipe.calibration
    tokens = tokens_of(job, remarks(listener, "calibrate"))
    about = {
        "model": model_name(job.original.source),
        "fingerprint": job.plan.source_fingerprint,
        "calibration": {**calibration.model_dump(mode="json"), "tokens": tokens.numel()},
    }
    walker = Walker(job.original, job.device, job.dtype, calibration.experts == "all", ranks)
    mine = tokens[ranks.share(len(tokens))]
    weights = token_weights(walker, mine, calibration, groups_in(job, out), listener)
    found = measure(walker, walker.embed(mine), needs, weights, listener, outside(job))
    if not ranks.first:
        deque(found, maxlen=0)
        return ranks.broadcast(Measured(0, 0, 0))
    inputs = write(out, found, in_file, about, job, options.overwrite)
    written = list(out.iterdir()) if out.is_dir() else [out]
    return ranks.broadcast(Measured(inputs, tokens.numel(), sum(file.stat().st_size for file in written)))


def check(out: Path, overwrite: bool) -> None:
    """Refuses an output that cannot be written. Raises StorageError."""
    if os.path.exists(out) and kind_of(out) is None:
        raise StorageError(f"{out} holds something else", hint="choose another name")
    if os.path.exists(out) and not overwrite:
        raise StorageError(f"{out} exists", hint="pass --overwrite to replace it, or choose another name")
    if not os.path.isdir(out):
        check_file(out)


def write(
    out: Path,
    found: Iterable[tuple[str, dict[str, InputStats]]],
    in_file: bool,
    about: Mapping[str, object],
    job: Job,
    overwrite: bool,
) -> int:
    """Writes statistics as they are measured, whole or not at all: how many inputs.

    Args:
        out: see `CalibrateOptions`.
        found: by unit, and `Module.reads`.
        in_file: whether a file holds them, else a folder.
        about: what the file says about it.
        job: the run.
        overwrite: replace an earlier file.
    """
    if not in_file:
        return write_folder(out, found, about, overwrite)
    stats = {reads: s for _, part in found for reads, s in part.items() if s.tokens}
    with new_file(out) as partial:
        if out.suffix == ".gguf":
            write_importance(partial, stats, job.original, job.plan.recipe.calibration)
        else:
            write_stats(partial, stats, about)
    return len(stats)


def kept(job: Job, out: Path, listener: Listener) -> frozenset[type[Statistic]]:
    """The statistics to measure on every input: those of channels, and what a run with the recipe could make use of.

    Args:
        job: with the recipe.
        out: an importance matrix holds only those of channels.
        listener: told what large statistics will take, and which are left to `quantize`.

    Raises:
        StorageError: the disk has less room than they need.
    """
    wanted = frozenset({k for p in job.plan.layers for k in in_order(p.needs) if not k.compares}) - CHANNELS
    warn = remarks(listener, "calibrate")
    if job.plan.recipe.calibration.propagate == "quantized":
        later = ", ".join(sorted(k.name() for k in wanted if k.sequential))
        if later and out.suffix != ".gguf":
            warn(f"not kept: {later}, which quantize measures behind quantized layers; {ORIGINAL} would keep it")
        wanted = frozenset({k for k in wanted if not k.sequential})
    if out.suffix == ".gguf" or not (wanted or job.plan.recipe.calibration.token_weights):
        return CHANNELS
    asked = outside(job)
    widths = {m.reads: m.shape[1] for m in modules(job.original) if m.block is not None or m.reads in asked}
    groups: dict[str, dict[str, int]] = {reads: {} for reads in widths}
    for module, count in groups_in(job, out).items():
        groups[module.reads][module.name] = count
    need = sum(nbytes(k, CHANNELS | wanted, groups[reads]) for reads, k in widths.items())
    names = ", ".join(sorted(k.name() for k in CHANNELS | wanted))
    warn(f"{out} will take {size(need)}: {names} of {len(widths)} inputs")
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < need:
        hint = "choose another disk, or a recipe that measures less"
        raise StorageError(f"no room for {out}", wanted=size(need), found=f"{size(free)} free", hint=hint)
    return CHANNELS | wanted


def write_folder(
    out: Path, found: Iterable[tuple[str, dict[str, InputStats]]], about: Mapping[str, object], overwrite: bool
) -> int:
    """Writes statistics as they are measured, whole or not at all: how many inputs."""
    with new_folder(out, overwrite) as folder:
        writer = StatsWriter(folder, about)
        for unit, stats in found:
            writer.add(unit, stats)
        writer.close()
    return len(writer.inputs)


def groups_in(job: Job, out: Path) -> dict[Module, int]:
    """Modules that weigh tokens, and groups of their outputs: whatever recipe comes; importances have one of each."""
    asked, plans = job.plan.recipe.calibration.token_weights, {p.module.name: p for p in job.plan.layers}
    if not asked:
        return {}
    found = (m for m in modules(job.original) if m.block is not None and m.expert is None)
    single = out.suffix == ".gguf"
    return {m: 1 if single or m.name not in plans else groups_of(plans[m.name], asked.groups) for m in found}


def outside(job: Job) -> frozenset[str]:
    """What is read behind the blocks: by an output layer, and by an embedding that is one if the recipe asks for it."""
    asked = {p.module.name for p in job.plan.layers if p.needs}
    return frozenset(
        {m.reads for m in modules(job.original) if m.role == "head" or (m.block is None and m.name in asked)}
    )


def measure(
    walker: Walker,
    hidden: Hidden,
    needs: frozenset[type[Statistic]],
    weights: Weights | None,
    listener: Listener,
    heads: Collection[str],
) -> Iterator[tuple[str, dict[str, InputStats]]]:
    """Statistics of every input, block by block ("block-0", ...), and last of `heads`, see `outside` ("head")."""
    blocks = len(walker.blocks)
    listener(Event("calibrate", 0, blocks))
    for i in range(blocks):
        by_input = weights.modules if weights else None
        yield f"block-{i}", walker.collect(walker.load_block(i), i, hidden, needs, by_input)
        listener(Event("calibrate", i + 1, blocks, f"block {i}"))
    if heads:
        yield "head", {reads: walker.collect_head(hidden, needs) for reads in heads}
