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
def list_(json: options.Json = False, debug: options.Debug = False) -> None:
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
    debug: options.Debug = False,
) -> None:
    """Print a recipe's text, for reading or as the start of your own.

    Example: `qtool recipes show w4a16-gptq-g64 > mine.yaml`
    """
    from qtool.recipe.load import find_recipe

    result(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


@app.command(cls=Command)
def validate(
    files: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Paths or names.", show_default=False)],
    overrides: options.Overrides = None,
    debug: options.Debug = False,
) -> None:
    """Check recipes and print all their mistakes at once.

    Example: `qtool recipes validate mine.yaml`
    """
    from qtool.recipe.load import load_recipe

    problems: list[str] = []
    for file in files:
        try:
            load_recipe(file, overrides or ())
        except RecipeError as error:
            problems += error.problems
        else:
            result(f"{file}: valid")
    if problems:
        raise RecipeError(problems, "not valid")


@app.command(cls=Command)
def schema(debug: options.Debug = False) -> None:
    """Print the recipe's JSON Schema, with which editors complete and check YAML.

    Example: `qtool recipes schema > recipe.schema.json`
    """
    from qtool.recipe.json_schema import json_schema

    document(json_schema())
