"""`qtool quantize`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli import options, ranks
from qtool.cli.cache import scores_folder
from qtool.cli.console import Console, document, result, table
from qtool.cli.libraries import quiet_profiler
from qtool.errors import UsageError
from qtool.report.budget import budget_lines
from qtool.report.meaning import meaning
from qtool.report.units import duration, size, verdicts

if TYPE_CHECKING:
    from qtool.pipeline.quantize import QuantizeOptions
    from qtool.report.model import Report


def families(incomplete: str) -> list[str]:
    """Names of families of recipes, for completion by shells."""
    from qtool.pipeline.family import FAMILIES

    return [name for name in FAMILIES if name.startswith(incomplete)]


Family = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="NAME",
        help="Instead of recipes, those of a family: gguf or gguf-fit.",
        autocompletion=families,
        show_default=False,
    ),
]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the work folder OUT.work after success.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="Write where the second block's time went, as a trace for Perfetto; the report sums it up.",
        show_default=False,
    ),
]
Verify = Annotated[bool, typer.Option(help="Read artifacts back and compare them with what was computed.")]


ALIKE = (
    *("device", "dtype", "seed", "stats", "imatrix"),
    *("keep", "overwrite", "profile", "verify", "private", "revision", "base_model", "license"),
)
"""Options that the command and `QuantizeOptions` call alike."""


def command(
    ctx: typer.Context,
    model: options.Model,
    recipe: options.Recipes = None,
    family: Family = None,
    out: options.OutOrName = None,
    overrides: options.Overrides = None,
    tensor_type: options.TensorType = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = None,
    limit_layers: options.LimitLayers = None,
    stats: options.Stats = None,
    imatrix: options.Imatrix = None,
    fit: options.Fit = None,
    bits: options.Bits = None,
    kld: options.Kld = None,
    scores: options.Scores = None,
    pre_tokenizer: options.PreTokenizer = None,
    split_max_size: options.SplitMaxSize = None,
    mmproj: options.VisionModel = None,
    model_free: options.ModelFree = False,
    jobs: options.Jobs = 1,
    keep: Keep = False,
    overwrite: options.Overwrite = False,
    profile: Profile = None,
    verify: Verify = True,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    revision: options.Revision = None,
    base_model: options.BaseModel = None,
    license: options.License = None,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Quantize MODEL as RECIPE says, write the artifacts and a report into OUT.

    With several recipes OUT gets a folder for each, and a page that compares them. An interrupted run continues where
    it stopped when the same command is given again.

    Example: `qtool quantize ./SmolLM2-135M -r w4a16-gptq-g64 -o ./SmolLM2-135M-w4`
    """
    given = dict(locals())  # as Typer converted them, which its context keeps as text in some releases
    console = Console(quiet, verbose, strict)
    recipes = recipes_of(recipe, family, console)
    if profile:
        quiet_profiler()
    asked = options_of(ctx, given, recipes)
    if len(recipes) == 1:
        run(asked, console, json)
    else:
        run_family(asked, recipes, console, json)


def options_of(ctx: typer.Context, given: Mapping[str, Any], recipes: list[str]) -> QuantizeOptions:
    """What was asked for by the arguments of the command, as the stage takes it; its recipe is the first one."""
    from qtool.pipeline.quantize import QuantizeOptions

    whole = recipes[0] if len(recipes) == 1 else given["family"] or "quantized"
    return QuantizeOptions(
        model=options.opened(given["model"], given["model_free"]),
        recipe=recipes[0],
        out=given["out"] or options.default_out(given["model"], whole),
        overrides=tuple(given["overrides"] or ()),
        tensor_types=tuple(given["tensor_type"] or ()),
        limit=given["limit_layers"],
        limit_of={"size": given["fit"], "bits": given["bits"], "kld": given["kld"]},
        options={name: given[name] for name in ("pre_tokenizer", "split_max_size", "mmproj")},
        scores=given["scores"] or scores_folder(),
        push_to=given["push_to_hub"],
        ranks=ranks.of(ctx),
        **{name: given[name] for name in ALIKE},
    )


def recipes_of(recipe: list[str] | None, family: str | None, console: Console) -> list[str]:
    """Names or paths of all recipes that were asked for. Raises UsageError: none, or no such family."""
    if (recipe is None) == (family is None):
        raise UsageError("wanted --recipe, once or several times, or --family")
    if family is None:
        return [options.named(each, console) for each in recipe or ()]
    from qtool.pipeline.family import FAMILIES

    if family not in FAMILIES:
        raise UsageError("--family", wanted=" or ".join(FAMILIES), found=family)
    return list(FAMILIES[family])


def run_family(asked: QuantizeOptions, recipes: list[str], console: Console, json: bool) -> None:
    """Quantizes by several recipes and prints what came of each, before a gate may say no."""
    from qtool.pipeline import family
    from qtool.pipeline.upload import claim

    with console:
        claim(asked.push_to, asked.private, asked.revision)
        reports = family.run(asked, recipes, console)
    if json:
        document([report.model_dump(mode="json") for report in reports])
    else:
        parts = [summary(report, asked.out / report.recipe_name) for report in reports]
        result("\n\n".join([*parts, f"compared: {asked.out / family.PAGE}"]))
    with console:
        family.conclude(reports, asked, console)


def run(asked: QuantizeOptions, console: Console, json: bool) -> None:
    """Quantizes and prints what came of it, before a gate or the hub may say no."""
    from qtool.pipeline import quantize as stage
    from qtool.pipeline.upload import claim

    with console:
        claim(asked.push_to, asked.private, asked.revision)
        report = stage.run(asked, console)
    if json:
        document(report.model_dump(mode="json"))
    else:
        result(summary(report, asked.out))
    with console:
        stage.conclude(report, asked, console)


def summary(report: Report, out: Path) -> str:
    """What a run did, in a few lines."""
    from qtool.pipeline.one_file import folder_of

    folder, rows = folder_of(out), []
    for artifact in report.artifacts:
        nbytes = sum(f.nbytes for f in artifact.files)
        checked = "verified" if artifact.verified else "not verified"
        share = f"{nbytes / report.source_bytes:.0%}"
        rows.append([artifact.kind, size(nbytes), share, checked, str(out if folder != out else out / artifact.path)])
    quantized = [e for e in report.layers if e.format]
    bits = sum(e.nbytes for e in quantized) * 8 / max(1, sum(e.shape[0] * e.shape[1] for e in quantized))
    lines = [
        table(["artifact", "size", "of source", "", "folder" if folder == out else "file"], rows, frozenset({1, 2}))
    ]
    whole = 8 * (sum(e.nbytes for e in report.layers) + report.other_bytes) / report.parameters
    lines.append(f"{len(quantized)} of {len(report.layers)} matrices quantized")
    lines.append(f"bits per weight: {bits:.2f} of quantized matrices, {whole:.2f} of the whole model")
    lines += budget_lines(report.allocation) if report.allocation else []
    errors = [(e.weight_error_db, e.name) for e in quantized if e.weight_error_db is not None]
    if errors:
        worst, name = min(errors)
        lines.append("weights are exact" if worst == math.inf else f"largest weight error {worst:.1f} dB in {name}")
    for e in report.evaluations:
        lines.append(f"{e.text}: {quality(e.model_dump())}")
        lines += [] if e.kld_mean is None else [f"  {meaning(e.kld_mean)}"]
    lines += verdicts(report.evaluations)
    seconds = sum(s.seconds for s in report.stages)
    peak = max((s.peak_bytes for s in report.stages), default=0)
    lines.append(f"{duration(seconds)}, {size(peak)} peak memory; report: {folder / 'report.html'}")
    lines += [f"{a.kind} {a.proof.words}" for a in report.artifacts if a.proof]
    return "\n".join(lines)


def quality(evaluation: dict[str, float | None]) -> str:
    """An evaluation's main numbers in one line."""
    text = f"perplexity {evaluation['ppl']:.4f} ± {evaluation['ppl_error']:.4f}"
    if evaluation["base_ppl"] is not None:
        text += (
            f" (baseline {evaluation['base_ppl']:.4f}), KL divergence {evaluation['kld_mean']:.3g} nats, "
            f"same top token {evaluation['top1']:.1%}"
        )
    return text
