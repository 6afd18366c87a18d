"""Several recipes for one model: a folder with a result for each, and a page that compares them.

Every recipe's files have the bytes that they have if it is carried out alone. Shared are tokens, the first look at the
source, the unquantized model in calibration and in evaluation (see `lockstep`), and what lies in a file (`stats`,
scores of budgets). A result that is there already is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qtool.checkpoint._base import Checkpoint
from qtool.errors import StorageError, UsageError
from qtool.evaluate.gates import refuse_missed
from qtool.models import open_model
from qtool.pipeline import compare, quantize
from qtool.pipeline.events import Event, Listener, silent
from qtool.pipeline.lockstep import solve_side_by_side
from qtool.pipeline.one_file import SUFFIX
from qtool.pipeline.repository import repository
from qtool.pipeline.shared import Shared
from qtool.pipeline.upload import upload
from qtool.recipe.load import load_recipe
from qtool.report.model import Report
from qtool.store.files import storage_errors
from qtool.store.names import output_path

FAMILIES = {
    "gguf": ("gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k"),
    "gguf-fit": ("gguf-q5_k_m-fit", "gguf-q4_k_m-fit", "gguf-q3_k_m-fit", "gguf-q2_k-fit"),
}
"""Recipes that many want together, by the name of all."""
PAGE = "index.html"


def run(options: quantize.QuantizeOptions, recipes: Sequence[str], listener: Listener = silent) -> list[Report]:
    """Carries out all recipes; the same call continues what was interrupted.

    Args:
        options: what is the same for all; `out` is the folder of the whole, `recipe` is not looked at.
        recipes: names or paths.
        listener: called with events of progress.

    Raises:
        UsageError: two recipes have one name, or what was asked for needs a single one.
        QtoolError: see `qtool.pipeline.quantize.run`.
    """
    names = checked(options, recipes)
    out = output_path(options.out, options.model)
    if options.ranks.first:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        refuse_others(out, names)
    model = options.model if isinstance(options.model, Checkpoint) else open_model(options.model)
    shared, reports = Shared(keep=True), []
    several = [
        replace(options, model=model, recipe=recipe, out=out / name, take_over=True, shared=shared)
        for name, recipe in zip(names, recipes, strict=True)
    ]
    solve_side_by_side(several, listener)
    for i, one in enumerate(several):
        listener(Event("family", i, len(names), one.out.name))
        reports.append(quantize.run(one, listener))
    if options.ranks.first:
        compare.run(compare.CompareOptions(tuple(str(out / name) for name in names), out / PAGE), listener)
    listener(Event("family", len(names), len(names), PAGE))
    return reports


def conclude(reports: Sequence[Report], options: quantize.QuantizeOptions, listener: Listener = silent) -> None:
    """Holds finished runs against the gates of their recipes, and uploads all as one repository if all pass.

    Args:
        reports: what `run` gave.
        options: what it was asked for.
        listener: called with events of progress.

    Raises:
        GateError: a gate is missed; nothing is uploaded.
        HubError, StorageError: see `upload` and `repository`.
    """
    for evaluation in (e for report in reports for e in report.evaluations):
        refuse_missed(evaluation.gates)
    if options.push_to and options.ranks.first:
        pages = (PAGE, Path(PAGE).with_suffix(".json").name)
        with repository(output_path(options.out, options.model), reports, pages, options.push_to) as folder:
            upload(folder, options.push_to, listener, private=options.private, revision=options.revision)


def checked(options: quantize.QuantizeOptions, recipes: Sequence[str]) -> list[str]:
    """Names of the recipes' folders. Raises UsageError, RecipeError: before any work."""
    if len(recipes) < 2:
        raise UsageError("a family", wanted="two recipes or more", found=len(recipes))
    if options.out.suffix == SUFFIX:
        raise UsageError(f"--out {options.out.name}", wanted="a folder for several recipes", found="one file")
    loaded = [load_recipe(recipe) for recipe in recipes]
    names = [recipe.name for recipe in loaded]
    other = next((e.to for recipe in loaded for e in recipe.export if e.to != "gguf"), None)
    if options.push_to and other:
        raise UsageError("--push-to-hub", wanted="one recipe, or several that export GGUF alone", found=other)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("--recipe", wanted="recipes with different names", found=f"{twice[0]} twice")
    if unfit := [name for name in names if not name or name != os.path.basename(name) or name.startswith(".")]:
        raise UsageError("--recipe", wanted="a name that can be a folder's", found=unfit[0])
    return names


def refuse_others(out: Path, names: Sequence[str]) -> None:
    """Raises StorageError: the folder holds something else than a family with these members may."""
    known = {PAGE, Path(PAGE).with_suffix(".json").name, *names, *(f"{name}.work" for name in names)}
    known |= {f"{name}{end}" for name in names for end in (".scores.safetensors", ".other.work")}
    if other := sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith(".")):
        hint = "choose another folder, or move it away"
        raise StorageError("the output folder holds something else", found=str(out / other[0]), hint=hint)
