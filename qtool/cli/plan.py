"""`qtool plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli import options
from qtool.cli.cache import scores_folder
from qtool.cli.console import Console, document, result, table
from qtool.errors import PlanError, UsageError
from qtool.report.budget import budget_lines
from qtool.report.units import size

if TYPE_CHECKING:
    from qtool.pipeline.prepare import Job
    from qtool.plan import Plan


Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Also try what would fail later: texts of calibration and evaluation, tokenizer, free disk, whether "
        "llama.cpp runs a small model of this kind, and with --push-to-hub whether the hub would take an upload.",
    ),
]


Curve = Annotated[
    bool,
    typer.Option(
        "--curve",
        help="Show ten sizes that the recipe's budget could have, from the smallest file to the best formats, and the "
        "KL divergence that is expected of each.",
    ),
]


def command(
    model: options.Model,
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    tensor_type: options.TensorType = None,
    limit_layers: options.LimitLayers = None,
    fit: options.Fit = None,
    bits: options.Bits = None,
    kld: options.Kld = None,
    scores: options.Scores = None,
    curve: Curve = False,
    push_to_hub: options.PushToHub = None,
    model_free: options.ModelFree = False,
    check: Check = False,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show what RECIPE would do to MODEL: formats, methods, sizes. No weight is read, unless a budget is divided.

    Example: `qtool plan ./SmolLM2-135M -r w4a16-gptq-g64`
    """
    console = Console(quiet, verbose, strict)
    recipe = options.named(recipe, console)
    from qtool.pipeline.prepare import prepare

    limit_of = {"size": fit, "bits": bits, "kld": kld}
    types, source = tuple(tensor_type or ()), options.opened(model, model_free)
    job = prepare(source, recipe, tuple(overrides or ()), limit=limit_layers, budget=limit_of, tensor_types=types)
    allocation = None
    for warning in job.plan.warnings:
        console.warn(warning)
    problems = problems_of(job, push_to_hub) if check else []
    if job.plan.recipe.budget is None and (scores or curve):
        flag = "--scores" if scores else "--curve"
        raise UsageError(flag, wanted="a recipe with a budget: such as gguf-fit", found=job.plan.recipe.name)
    if curve:
        show_curve(job, scores, console, json)
        return
    if job.plan.recipe.budget:
        refuse(problems)  # before it takes minutes
        from qtool.pipeline.budget import divided

        with console:
            job, allocation = divided(job, scores or scores_folder(), console)
    plan = job.plan
    if json:
        document(as_json(plan) | {"allocation": allocation and allocation.model_dump(mode="json")})
    else:
        result("\n".join([show(plan), *(budget_lines(allocation) if allocation else [])]))
    refuse(problems)


def problems_of(job: Job, push_to: str | None) -> list[str]:
    """What would fail later, a line each."""
    from qtool.pipeline.check import check

    return check(job, Path(), push_to)


def refuse(problems: list[str]) -> None:
    """Raises PlanError: there are some."""
    if problems:
        raise PlanError(problems, "this run would fail")


def show_curve(job: Job, scores: Path | None, console: Console, json: bool) -> None:
    """A line for each size: bytes, bits, what is expected, and how much of the weights gets which format."""
    from qtool.pipeline.curve import curve

    with console:
        points = curve(job, scores or scores_folder(), console)
    if json:
        document([asdict(point) for point in points])
        return
    rows = []
    for point in points:
        weights = sum(point.formats.values())
        shares = ", ".join(f"{name} {count / weights:.0%}" for name, count in point.formats.items())
        rows.append([size(point.nbytes), f"{point.bits:.3f}", f"{point.kld:.4g}", shares])
    header = ["size", "bits per weight of the whole model", "expected KL divergence, nats", "formats of what is open"]
    result(table(header, rows, frozenset({0, 1, 2})))


def show(plan: Plan) -> str:
    """A line for all layers of a role that are treated alike, then totals."""
    rows = [
        [
            s.role,
            str(s.layers),
            s.label,
            s.method or "-",
            f"{s.bits / s.weights:.3f}",
            size(s.bits / 8),
            s.fallback or "",
        ]
        for s in plan.summary()
    ]
    quantized = [s for s in plan.summary() if s.method]
    bits, weights = sum(s.bits for s in quantized), sum(s.weights for s in quantized)
    rounded = f"{bits / weights:.3f} of quantized matrices, " if quantized else ""
    header = ["role", "layers", "format", "method", "bits", "size", "fallback" if any(r[-1] for r in rows) else ""]
    return "\n".join(
        [
            table(header, rows, frozenset({1, 4, 5})),
            f"other tensors: {size(plan.other_bytes)}",
            f"predicted size: {size(plan.predicted_bytes)}",
            f"bits per weight: {rounded}{plan.bits_per_weight:.3f} of all matrices",
            *([f"KV cache: {plan.recipe.kv_cache.label}"] if plan.recipe.kv_cache else []),
            f"artifacts: {', '.join(plan.artifacts)}",
        ]
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Every layer, and totals."""
    return {
        "recipe": plan.recipe.name,
        "layers": [
            {
                "name": p.module.name,
                "role": p.module.role,
                "block": p.module.block,
                "shape": p.module.shape,
                "format": p.format and p.format.label,
                "method": p.method and p.method.name(),
                "activations": p.activations and p.activations.label,
                "keep": None if p.format else p.keep,
                "fallback": p.fallback,
                "rule": p.rule,
                "bits": p.bits,
            }
            for p in plan.layers
        ],
        "other_bytes": plan.other_bytes,
        "predicted_bytes": plan.predicted_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "kv_cache": plan.recipe.kv_cache and plan.recipe.kv_cache.label,
        "artifacts": plan.artifacts,
        "warnings": plan.warnings,
    }
