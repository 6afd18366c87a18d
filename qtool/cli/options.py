"""Arguments and options that several commands share, each with its help."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool import registry

if TYPE_CHECKING:
    from qtool.checkpoint._base import Checkpoint
    from qtool.cli.console import Console

OUTPUT = "Output"
COMPUTE = "Compute"


def filled(text: str) -> str:
    """A help text with the names of a room's entries for "{room}"; they are looked up only where help is shown."""
    for room in ("formats", "methods", "artifact"):
        if f"{{{room}}}" in text:
            text = text.replace(f"{{{room}}}", ", ".join(registry.names(room)))
    return text


def opened(model: str, model_free: bool) -> str | Checkpoint:
    """The model as stages take it. Raises CheckpointError: it cannot be opened without its class."""
    if not model_free:
        return model
    from qtool.models import open_model_free

    return open_model_free(model)


def _size(text: str) -> int:
    """Bytes of "2G"; the grammar of recipes is imported only if there is something to read."""
    from qtool.recipe.size import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def recipe_names(incomplete: str) -> list[str]:
    """Recipes that ship, for completion by shells; a path they complete themselves."""
    from qtool.recipe.load import shelf

    return sorted(path.stem for path in shelf().glob("*.yaml") if path.stem.startswith(incomplete))


def layouts(incomplete: str) -> list[str]:
    """Layouts of artifacts, for completion by shells."""
    return [name for name in registry.names("artifact") if name.startswith(incomplete)]


def tensor_types(incomplete: str) -> list[str]:
    """PATTERN=TYPE with every type, for completion by shells, once the pattern is there."""
    pattern, equals, begun = incomplete.partition("=")
    names = [*registry.names("formats"), "f16", "bf16", "f32"] if equals else []
    return [f"{pattern}={name}" for name in names if name.startswith(begun)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A checkpoint, quantized or not: local folder, hub id, or GGUF file.", show_default=False
    ),
]
ModelFree = Annotated[
    bool,
    typer.Option(
        "--model-free",
        help="Know the model by names and shapes of its tensors only, whether or not transformers has a class for it; "
        "for recipes without data that export compressed-tensors or fp8.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes that share the work, as those of torchrun on one host do: tensors, blocks, shards, chunks.",
    ),
]
ArtifactPath = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A quantized model: {artifact}.", show_default=False)
]
Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A recipe file, or the name of one that ships with qtool (`qtool recipes list`). "
        "Formats: {formats}. Methods: {methods}. Artifacts: {artifact}.",
        autocompletion=recipe_names,
        show_default=False,
    ),
]
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A recipe file, or the name of one that ships with qtool (`qtool recipes list`). May be repeated. "
        "Formats: {formats}. Methods: {methods}. Artifacts: {artifact}.",
        autocompletion=recipe_names,
        show_default=False,
    ),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Another type for the tensors in whose GGUF name the regular expression is found, as in attn_v=q6_k; the "
        "first that is found decides, before the recipe. May be repeated.",
        autocompletion=tensor_types,
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe field, as in --set calibration.samples=32. May be repeated.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where the result goes.", show_default=False)]
OutOrName = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="Folder of the result; MODEL-RECIPE in the working folder if not given. NAME.gguf: that file, and what is "
        "said about it in the folder NAME.report.",
        show_default=False,
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="End with code 12 where there would be a warning.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result of qtool there.", rich_help_panel=OUTPUT)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.", rich_help_panel=COMPUTE)]
Dtype = Annotated[
    Literal["auto", "bf16", "fp32"],
    typer.Option(help="Type of forward passes; auto: bf16 where the processor is fast at it.", rich_help_panel=COMPUTE),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Replaces the recipe's calibration seed.", rich_help_panel=COMPUTE, show_default=False),
]
LimitLayers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Smoke run: quantize N decoder blocks, leave the rest.", show_default=False),
]
Stats = Annotated[
    Path | None, typer.Option(metavar="STATS", help="Reuse what `qtool calibrate` measured.", show_default=False)
]
Imatrix = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Round with an importance matrix of llama-imatrix or `qtool calibrate` (.gguf, or .dat): "
        "stands for --set 'method={rtn: {importance: true}}'.",
        show_default=False,
    ),
]
Fit = Annotated[
    int | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        parser=_size,
        help="Divide the recipe's budget: the file has at most so many bytes, as in 4.2GB, headers included.",
        show_default=False,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits",
        metavar="BITS",
        min=0,
        help="The same in bits of the whole file per weight of the model, as in 4.25.",
        show_default=False,
    ),
]
Kld = Annotated[
    float | None,
    typer.Option(
        "--kld",
        metavar="NATS",
        min=0,
        help="The smallest file whose KL divergence, tried on held-out samples, is at most this.",
        show_default=False,
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where to keep what a budget is divided by, so that another budget takes seconds; read if it is there. "
        "By default in ~/.cache/qtool.",
        show_default=False,
    ),
]
VisionModel = Annotated[
    str | None,
    typer.Option(
        "--mmproj",
        metavar="MODEL",
        help="Write the vision tower and projector of MODEL, a folder or hub id, beside the GGUF model.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
SplitMaxSize = Annotated[
    int | None,
    typer.Option(
        "--split-max-size",
        metavar="SIZE",
        parser=_size,
        help="Cut the GGUF model into files with at most so much of tensors each: 2G, 500M, or bytes.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
PreTokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="llama.cpp's name for how the tokenizer splits text, where gguf does not recognize it.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="REPO",
        help="The original's hub id, for the model card; else what the source's own card says.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
License = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The license that the model card names, as in apache-2.0; else what the source's own card says.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
PushToHub = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the result to this hub repository.", show_default=False)
]
Private = Annotated[
    bool, typer.Option("--private", help="Create the hub repository so that nobody else sees it.", show_default=False)
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="BRANCH", help="Branch of the hub repository that gets the upload.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but warnings and errors.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every step on stderr.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]


def named(recipe: str, console: Console) -> str:
    """A recipe's name or path; tells where the name of a file stands for a recipe that ships."""
    from qtool.recipe.load import find_recipe

    found = find_recipe(recipe)
    if recipe != found.stem and not os.path.exists(recipe):
        console.note(f"there is no file {recipe}: using the recipe {found.stem} that ships with qtool")
        return found.stem
    return recipe


def default_out(model: str, recipe: str) -> Path:
    """MODEL-RECIPE in the working folder: of a folder, a GGUF file or a hub id, and of a recipe's name or path."""
    name = re.sub(r"(?<=.)@[\w./-]+$", "", model) if not os.path.exists(model) else os.path.abspath(model)
    return Path(f"{re.sub(r'[.]gguf$', '', Path(name).name) or 'model'}-{Path(recipe).stem}")
