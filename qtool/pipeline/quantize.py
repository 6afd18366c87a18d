"""The whole way: plan, measure, solve block by block, evaluate, write artifacts, report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from qtool.calibrate.shards import is_stats_folder
from qtool.checkpoint._base import Checkpoint
from qtool.errors import PlanError, StorageError, UsageError
from qtool.evaluate.gates import refuse_missed
from qtool.numerics.heap import give_back
from qtool.numerics.threads.parallel import wake
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline import evaluate
from qtool.pipeline.budget import refuse_too_large
from qtool.pipeline.card import card_of, origin
from qtool.pipeline.content import content_beside, refuse_changed
from qtool.pipeline.contest import Dividing, decided
from qtool.pipeline.events import Event, Listener, silent
from qtool.pipeline.finish import finish
from qtool.pipeline.importance import by_importance
from qtool.pipeline.loop import solve_all
from qtool.pipeline.one_file import SUFFIX, check_one_file, folder_of, name_file
from qtool.pipeline.prepare import Job, prepare
from qtool.pipeline.profile import Profile
from qtool.pipeline.publish import publish
from qtool.pipeline.shared import Shared
from qtool.pipeline.statistics import Statistics, statistics_for
from qtool.pipeline.stopwatch import Stopwatch
from qtool.pipeline.summarize import make_report
from qtool.pipeline.transform import Made, keep_edits, transformed
from qtool.pipeline.units import units
from qtool.pipeline.upload import check_repository, upload
from qtool.pipeline.work import Work, begun, identity, open_work, remove_work, result_identity
from qtool.recipe.schema import Recipe
from qtool.report.model import AllocationEntry, Report
from qtool.report.render import read_report, write_report
from qtool.store.files import check_file, check_free, damaged_file, new_folder
from qtool.store.names import output_path

NOT_PROFILED = "--profile: an earlier run solved everything, so no trace was written"


@dataclass(frozen=True)
class QuantizeOptions:
    """What `qtool quantize` was asked to do.

    Attributes:
        model, recipe, overrides, seed, limit: see `prepare`.
        out: folder of the result; `<out>.work` is used on the way. Or NAME.gguf, see `qtool.pipeline.one_file`.
        device, dtype: "auto", or where and in which type to compute.
        stats: statistics of an earlier `calibrate` to use instead of running the model.
        imatrix: an importance matrix of llama.cpp to use instead; sets the recipe's method to rounding with it.
        limit_of: "size", "bits" or "kld" of the recipe's budget; None as a value: not given.
        tensor_types: PATTERN=TYPE each, see `qtool.artifact.gguf.tensor_types`.
        scores: file with what a budget is divided by, read if it is there, else written; or a folder of such files.
        options: of the artifacts that the recipe exports, by name; None as a value: not given.
        keep: leave the work folder.
        overwrite: replace an earlier result.
        take_over: an earlier result of the very same run is what this one comes to.
        verify: read artifacts back.
        push_to: hub repository to upload to.
        private: create it so that nobody else sees it.
        revision: its branch that gets the upload; None: the main one.
        base_model, license: what the model card says instead of what the source's own card does.
        ranks: who does it together; all are asked for the same.
        profile: where the trace of one block goes, see `qtool.pipeline.profile`.
        shared: what other runs for the model have found out.
    """

    model: str | Checkpoint
    recipe: str | Recipe
    out: Path
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    seed: int | None = None
    limit: int | None = None
    stats: Path | None = None
    imatrix: Path | None = None
    limit_of: Mapping[str, object] = field(default_factory=dict)
    tensor_types: tuple[str, ...] = ()
    scores: Path | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    keep: bool = False
    overwrite: bool = False
    take_over: bool = False
    verify: bool = True
    push_to: str | None = None
    private: bool = False
    revision: str | None = None
    base_model: str | None = None
    license: str | None = None
    ranks: Ranks = ALONE
    profile: Path | None = None
    shared: Shared = field(default_factory=Shared, compare=False)


def run(options: QuantizeOptions, listener: Listener = silent) -> Report:
    """Quantizes a model; the same call continues what was interrupted. `conclude` does what is left.

    Raises:
        QtoolError: of every kind.
    """
    if options.out.suffix != SUFFIX:
        return into_folder(replace(options, out=output_path(options.out, options.model)), None, listener)
    file = output_path(options.out, options.model)
    report = into_folder(replace(options, out=output_path(folder_of(file), options.model)), file, listener)
    if options.ranks.first:
        name_file(file)
    return report


def into_folder(options: QuantizeOptions, file: Path | None, listener: Listener) -> Report:
    """The result in a folder, of which a file will get another name; see `run`."""
    options.shared.once("checked", partial(check, options))
    out, ranks = options.out, options.ranks
    place = out.with_name(f"{out.name}.work")
    taken = options.take_over and not options.overwrite
    fresh = not taken and not os.path.exists(place)  # nor where the system refuses to look, unlike Path.exists
    if ranks.first and fresh:
        check_free(out, options.overwrite)
    watch = Stopwatch(options.shared.stages.get(out))
    with watch.stage("plan"):
        job = options.shared.once(("job", out), partial(prepared, options, file))
    for warning in job.plan.warnings:
        listener(Event("plan", 1, 1, warning, warning=True))
    if ranks.first:
        job.shared.once("unchanged", partial(refuse_changed, job.original.source, listener))
    made, scores = Made(), options.scores or scores_of(out)
    if job.plan.recipe.transforms:
        with watch.stage("transform"):
            job, made = transformed(job, place, options.stats or options.imatrix, listener)
    wake(job.device)
    with content_beside(job) as content:
        dividing = Dividing(
            options.base_model, options.license, options.imatrix, options.stats, scores, bool(options.scores), content
        )
        job, allocation = decided(job, dividing, made, place, watch, listener)
        with watch.stage("calibrate"):
            source = statistics_for(job, options.stats or options.imatrix, listener)
        run_identity = ranks.broadcast(identity(job, source.digest, content(), made.edits))
    earlier = ranks.first and not options.overwrite and (taken or begun(place, run_identity))
    report = ranks.broadcast(finished(out, job, run_identity) if earlier else None)
    if report is not None:  # an earlier run was ended before it could tidy up
        say_what_is_missing(options.profile, listener)
    else:
        if ranks.first:
            check_free(out, options.overwrite)
        with open_work(place, job, run_identity, listener) as work:
            if made.run and ranks.first:
                keep_edits(made, place)
            report = produce(job, work, source, options, allocation, watch, listener)
    if ranks.first and not options.keep and os.path.exists(place):
        remove_work(place, out)
        if not options.scores:
            scores_of(out).unlink(missing_ok=True)
    return report


def prepared(o: QuantizeOptions, file: Path | None) -> Job:
    """The run with its plan. Raises QtoolError: something would fail after hours of work.

    Args:
        o: what was asked.
        file: name that the result's file will get.
    """
    recipe, overrides = (by_importance(o.recipe, o.overrides), ()) if o.imatrix else (o.recipe, o.overrides)
    place = o.device, o.dtype, o.options, o.ranks, o.limit_of, o.tensor_types
    job = replace(prepare(o.model, recipe, overrides, o.seed, o.limit, *place), shared=o.shared)
    evaluate.check(job.plan.recipe.eval)
    refuse_together(job)
    if file and o.ranks.first:
        check_one_file(file, job.artifacts, any(map(o.options.get, ("split_max_size", "mmproj"))), o.overwrite)
    return job


def say_what_is_missing(trace: Path | None, listener: Listener) -> None:
    """Warns of a trace that was asked for where nothing was left to be profiled."""
    if trace:
        listener(Event("quantize", 0, 0, NOT_PROFILED, warning=True))


def scores_of(out: Path) -> Path:
    """Where scores are until a run is done."""
    return out.with_name(f"{out.name}.scores.safetensors")


def refuse_together(job: Job) -> None:
    """Refuses what processes cannot do together. Raises PlanError."""
    if job.ranks.size > 1 and (alone := {p.method.name() for u in units(job.plan) for p in u.blockwise if p.method}):
        lines = [f"{name} trains blocks, which one process does; run it without torchrun" for name in sorted(alone)]
        raise PlanError(lines, f"{job.ranks.size} processes")
    if job.ranks.size > 1 and job.plan.recipe.budget:
        raise PlanError(["one process divides a budget; run it without torchrun"], f"{job.ranks.size} processes")


def check(options: QuantizeOptions) -> None:
    """Refuses what would fail after hours of work. Raises UsageError, StorageError."""
    if options.stats and options.imatrix:
        raise UsageError("--stats and --imatrix exclude each other")
    for flag, file in (("--stats", options.stats), ("--imatrix", options.imatrix)):
        if file and not is_stats_folder(file) and not os.path.isfile(file):
            raise UsageError(flag, wanted="a file of `qtool calibrate` or llama-imatrix", found=f"no file {file}")
    if options.scores and not os.path.isdir(options.scores):
        check_file(output_path(options.scores))
    if options.profile:
        check_file(options.profile)
    check_repository(options.push_to, options.private, options.revision)


def conclude(report: Report, options: QuantizeOptions, listener: Listener = silent) -> None:
    """Holds a finished run against the gates of its recipe, and uploads it if it passes.

    Raises:
        GateError: a gate is missed; nothing is uploaded.
        HubError: see `upload`.
    """
    for evaluation in report.evaluations:
        refuse_missed(evaluation.gates)
    if options.push_to and options.ranks.first:
        upload(
            output_path(folder_of(options.out)),
            options.push_to,
            listener,
            private=options.private,
            revision=options.revision,
        )


def produce(
    job: Job,
    work: Work,
    source: Statistics,
    options: QuantizeOptions,
    allocation: AllocationEntry | None,
    watch: Stopwatch,
    listener: Listener,
) -> Report:
    """Solves what is not solved yet, evaluates, and writes artifacts and report under their final name."""
    with watch.stage("quantize"):
        profile = Profile(options.profile, job.device) if options.profile and job.ranks.first else None
        entries, caches, blocks = solve_all(job, work, source, listener, profile)
        source.end()
        give_back()
        if profile and not profile.entries:
            say_what_is_missing(options.profile, listener)
    if not job.ranks.first:
        job.ranks.barrier()  # for what the first one finds, which is taken over here
    model, finishing = finish(job, work.model(), work.folder, work.run, watch, listener)
    if job.ranks.first:
        job.ranks.barrier()
    evaluations = []
    if job.plan.recipe.eval:
        with watch.stage("evaluate"):
            evaluations.append(evaluate.as_asked(job, model, job.plan.recipe.eval, listener))
    provenance = origin(job.original, options.base_model, options.license)
    report = make_report(job, entries, caches, evaluations, source.about, provenance)
    found = {"repository": options.push_to or "", "allocation": allocation, "blocks": blocks, "finish": finishing}
    report = report.model_copy(update=found | {"profile": profile.entries if profile else ()})
    card = card_of(report, importance=source.about if "entries" in source.about else None)
    with ExitStack() as making:
        folder = making.enter_context(new_folder(options.out, options.overwrite)) if job.ranks.first else Path()
        folder = job.ranks.broadcast(folder)
        artifacts = publish(job.artifacts, model, folder, card, options.verify, watch, listener, job.ranks)
        if job.ranks.first:
            refuse_too_large(artifacts, allocation)
        written = {"artifacts": artifacts, "stages": tuple(watch.entries), "run": result_identity(job, work.run)}
        report = report.model_copy(update=written)
        if job.ranks.first:
            write_report(report, folder)
    return job.ranks.broadcast(report)


def finished(out: Path, job: Job, run: Mapping[str, Any]) -> Report | None:
    """The report of a result that this very run wrote; None if another one did, or there is none.

    Raises:
        CheckpointError: its report cannot be read.
        StorageError: it is this run's, but no longer whole.
    """
    if not (out / "report.json").is_file():
        return None
    report = read_report(out / "report.json")
    if report.run != result_identity(job, run):
        return None
    if damage := damaged_file(out):
        hint = "pass --overwrite to write it again"
        raise StorageError(f"{out} holds the result of this run, but {damage} is missing or was changed", hint=hint)
    return report
