"""`qtool recipes`: list, show, validate, schema."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli import options
from qtool.cli.boundary import Command
from qtool.cli.console import document, result, table
from qtool.errors import RecipeError

app = typer.Typer(no_args_is_help=True, help="List, show and check recipes.", rich_markup_mode="markdown")


@app.command("list", cls=Command)
def list_(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """List the recipes that ship with qtool.

    Example: `qtool recipes list`
    """
    from qtool.recipe.load import list_recipes

    entries = list_recipes()
    if json:
        document([{"name": e.name, "description": e.description, "path": str(e.path)} for e in entries])
    else:
        result(table(["recipe", "description"], [[e.name, e.description] for e in entries]))


@app.command(cls=Command)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or a path.", show_default=False)],
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Print a recipe's text, for reading or as the start of your own.

    With --json it is the recipe as qtool reads it: checked, with what it extends and with all defaults.

    Example: `qtool recipes show w4a16-gptq-g64 > mine.yaml`
    """
    from qtool.recipe.load import find_recipe, load_recipe

    if json:
        document(load_recipe(name).model_dump(mode="json"))
        return
    try:
        text = find_recipe(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(["wanted YAML in UTF-8, found other bytes"], f"recipe {name}") from None
    except OSError as error:
        raise RecipeError([f"cannot be read: {error.strerror}"], f"recipe {name}") from None
    result(text.rstrip("\n"))


@app.command(cls=Command)
def validate(
    files: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Paths or names.", show_default=False)],
    overrides: options.Overrides = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Check recipes and print all their mistakes at once.

    Example: `qtool recipes validate mine.yaml`
    """
    from qtool.recipe.load import load_recipe

    problems: dict[str, list[str]] = {}
    for file in files:
        problems[file] = []
        try:
            load_recipe(file, overrides or ())
        except RecipeError as error:
            problems[file] += error.problems
        if not json and not problems[file]:
            result(f"{file}: valid")
    if json:
        document([{"recipe": file, "problems": found} for file, found in problems.items()])
    if any(problems.values()):
        raise RecipeError([line for found in problems.values() for line in found], "not valid")


@app.command(cls=Command)
def schema(quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """Print the recipe's JSON Schema, with which editors complete and check YAML.

    Example: `qtool recipes schema > recipe.schema.json`
    """
    from qtool.recipe.json_schema import json_schema

    document(json_schema())
