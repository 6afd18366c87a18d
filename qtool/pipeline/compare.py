"""Gathers what is known of several quantized models, measures what is not, and writes one page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from qtool.checkpoint.gguf_parts import first_parts
from qtool.checkpoint.open import local
from qtool.errors import QtoolError, UsageError
from qtool.evaluate.llamacpp import speed_of
from qtool.evaluate.result import Evaluation
from qtool.pipeline import evaluate
from qtool.pipeline.events import Event, Listener, silent
from qtool.pipeline.inspect import run as inspect
from qtool.pipeline.one_file import described
from qtool.report.comparison import Compared, Comparison, compare, html, protocol
from qtool.report.model import Report
from qtool.report.render import read_report
from qtool.report.summary import bits_per_weight, error_rows, main_evaluation, model_bytes, stored_as, with_inputs
from qtool.report.summary import errors as layer_errors
from qtool.store.files import check_file, new_file, sha256
from qtool.store.names import output_path


@dataclass(frozen=True)
class CompareOptions:
    """What `qtool compare` was asked to do.

    Attributes:
        sources: folders of runs, report.json files, artifacts, GGUF files.
        out: the page; its JSON lies beside it, with the suffix .json.
        speed: ask llama.cpp, where it is installed, how fast it is with GGUF files.
        measure: how to evaluate what has no evaluation of that text; None: not at all. `artifact` is replaced.
    """

    sources: tuple[str, ...]
    out: Path | None = None
    measure: evaluate.EvaluateOptions | None = None
    speed: bool = True


def run(options: CompareOptions, listener: Listener = silent) -> Comparison:
    """Compares models.

    Raises:
        UsageError: fewer than two, or a page that is called as its JSON is.
        CheckpointError, StorageError: one cannot be read, or the page cannot be written.
    """
    if len(options.sources) < 2:
        raise UsageError("qtool compare", wanted="two models or more", found=len(options.sources))
    out = options.out and output_path(options.out, *options.sources)
    if out:
        if out.suffix == ".json":
            raise UsageError("--out", wanted="the page, such as page.html, beside which its JSON lies", found=out.name)
        check_file(out)
    names = unique(options.sources)
    found = [entry(source, name) for source, name in zip(options.sources, names, strict=True)]
    if options.measure:
        found = measured(found, options.measure, listener)
    if options.speed and find_spec("xllamacpp"):
        found = [timed(each, listener) for each in found]
    comparison = compare(found)
    if out:
        for path, text in ((out, html(comparison)), (out.with_suffix(".json"), comparison.model_dump_json(indent=1))):
            with new_file(path) as partial:
                partial.write_text(text, encoding="utf-8")
    return comparison


def unique(sources: Sequence[str]) -> list[str]:
    """Short names of sources: the last parts of their paths, as many as tell them apart."""
    parts = [Path(source).parts for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{source} ({i})" for i, source in enumerate(sources, 1)]


def report_of(source: str) -> Report | None:
    """The report of a run's folder, or the report itself; None if it is neither."""
    path = described(local(source))
    path = path / "report.json" if os.path.isdir(path) else path
    return read_report(path) if path.name == "report.json" and os.path.isfile(path) else None


def entry(source: str, name: str) -> Compared:
    """What is known of one model."""
    if report := report_of(source):
        errors = {row.role: row.median for row in error_rows(report)}
        known_errors = {layer.name: db for layer, db in layer_errors(report)}
        layers = {e.name: (stored_as(e), known_errors.get(e.name)) for e in report.layers}
        nbytes, bits = weighed(source, report)
        return Compared(
            name=name,
            source=source,
            kind=report.recipe_name,
            nbytes=nbytes,
            bits_per_weight=bits,
            evaluation=main_evaluation(report),
            errors=errors,
            layers=layers,
        )
    contents = inspect(source)
    matrices = [t for t in contents.tensors if len(t.shape) == 2]
    return Compared(
        name=name,
        source=source,
        kind=contents.kind,
        nbytes=-(-contents.bits // 8),
        bits_per_weight=contents.bits / contents.parameters,
        evaluation=None,
        errors={},
        layers={t.name.removesuffix(".weight"): (with_inputs(t.type, t.activations), None) for t in matrices},
    )


def weighed(source: str, report: Report) -> tuple[int, float]:
    """Bytes and bits per weight of a run's tensors: its artifact's, or what its report says where that is gone."""
    try:
        contents = inspect(artifact_of(source))
    except QtoolError:
        return model_bytes(report), bits_per_weight(report)
    return -(-contents.bits // 8), contents.bits / contents.parameters


def measured(known: Sequence[Compared], measure: evaluate.EvaluateOptions, listener: Listener) -> list[Compared]:
    """The same with evaluations that compare: of one text, in the same chunks; those that fit are not done again."""
    text = sha256(measure.text)

    def fits(one: Compared) -> bool:
        found = one.evaluation
        if found is None or found.kld_mean is None or (found.text_sha256, found.context) != (text, measure.context):
            return False
        return measure.chunks in (None, found.chunks)

    def again(one: Compared) -> Compared:
        found: Evaluation = evaluate.run(replace(measure, artifact=artifact_of(one.source)), listener)
        return one.model_copy(update={"evaluation": found})

    def protocols(ones: Iterable[Compared]) -> set[tuple[object, ...]]:
        return {protocol(one.evaluation) for one in ones if one.evaluation}

    kept = [one for one in known if fits(one)]
    anew = {one.name: again(one) for one in known if one not in kept}
    alike = protocols(anew.values() or kept)
    anew |= {one.name: again(one) for one in kept if protocols([one]) != alike}
    return [anew.get(one.name, one) for one in known]


def artifact_of(source: str) -> str:
    """Where the first artifact of a run is; anything else is one."""
    report = report_of(source)
    if report is None:
        return source
    folder = described(local(source))
    return str((folder if folder.is_dir() else folder.parent) / report.artifacts[0].path)


def timed(known: Compared, listener: Listener) -> Compared:
    """The same with the speed of llama.cpp, if there is one GGUF file for it that it runs."""
    place = Path(artifact_of(known.source))
    files = first_parts(place) if place.is_dir() else [file for file in first_parts(place.parent) if file == place]
    if len(files) != 1:
        return known
    listener(Event("compare", 0, 0, f"speed of {known.name}"))
    try:
        return known.model_copy(update={"speed": tuple(speed_of(files[0]))})
    except QtoolError as error:
        listener(Event("compare", 0, 0, str(error), warning=True))
        return known
