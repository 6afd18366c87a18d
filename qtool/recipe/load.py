"""A recipe's name or path -> a checked `Recipe`: finds the file, follows `extends`, applies `--set`.

`extends: NAME_OR_PATH` begins with another recipe. What the file says itself wins:
  * `name`, `description` and `recipe` are never inherited; every file has its own.
  * `calibration` and `eval` are merged key by key; `export` replaces the other list.
  * A rule of `layers` that is for the same layers as one of the base's (equal `match`, `blocks` and `when`) takes that
    rule's place. All other rules come before the base's, in their order, so that they decide first.
A relative path in `extends` counts from the folder of the file that says it.

Importing this module imports no torch, so that recipes are listed quickly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import RecipeError, one_line, suggestion
from qtool.problems import Keys, explain, show
from qtool.recipe.nodes import BROKEN, Node, NodeReader

if TYPE_CHECKING:
    from qtool.recipe.schema import Recipe

OWN = frozenset({"recipe", "name", "description", "extends"})
"""Keys that a recipe never inherits."""
INDEX = re.compile("[0-9]{1,6}")
DEEPEST = 32
"""Recipes that may extend each other in a row."""


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that ships with qtool."""

    name: str
    description: str
    path: Path


def shelf() -> Path:
    """The folder of the recipes that ship: inside the installed package, or in the repository beside it."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[ShippedRecipe]:
    """The recipes that ship, by name."""
    reader, entries = NodeReader(), []
    for path in sorted(shelf().glob("*.yaml")):
        fields = reader.read(path).plain()
        entries.append(ShippedRecipe(path.stem, str(fields.get("description", "")), path))
    return entries


def find_recipe(name: str, folder: Path | None = None) -> Path:
    """The file that a user means: a path first, then the name of a recipe that ships.

    Args:
        name: path, or name, with ".yaml" or without.
        folder: where a relative path counts from; None: the working folder.

    Raises:
        RecipeError: neither exists.
    """
    path = (folder or Path()) / name
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # too long for a path, or no characters of one
        pass
    shipped = {path.stem: path for path in shelf().glob("*.yaml")}
    if (plain := re.sub(r"\.ya?ml$", "", name)) in shipped:
        return shipped[plain]
    hint = suggestion(plain, list(shipped), "`qtool recipes list` shows those that ship")
    raise RecipeError([f"no file and no shipped recipe is called {show(name)}; {hint}"], "recipe not found")


def load_recipe(name: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name: path, or name of a recipe that ships; or what such a file says, in which paths count from the working
            folder.
        overrides: `key=value` each: a dotted path with list indices, as in `calibration.samples=32` or
            `layers.0.weights=int4-g64`, and a value in YAML.

    Raises:
        RecipeError: everything that is wrong, each with file and line (or flag), key, found and wanted.
    """
    from pydantic import ValidationError

    from qtool.recipe.schema import Recipe

    reader = NodeReader()
    if isinstance(name, str):
        tree = _read(find_recipe(name), reader, ())
    else:
        tree = _follow(reader.parse(_spelled(name), lambda _: "recipe"), Path(), reader, ())
        name = str(name.get("name", "without a name"))
    for text in overrides:
        _override(tree, text, reader)
    plain = tree.plain()
    try:
        recipe = Recipe.model_validate(plain, strict=True)
    except ValidationError as error:
        for keys, text in explain(error, Recipe, plain):
            node = tree.at(keys)
            if node.value is not BROKEN:
                reader.report(node.where, keys, text)
    if reader.problems:
        raise RecipeError(sorted(reader.problems, key=_by_line), f"recipe {name}")
    for rule, node in zip(recipe.layers, tree.value["layers"].value, strict=True):
        rule.place(node.where)
    return recipe


def _by_line(problem: str) -> tuple[str, int]:
    """Sorts "file:12: text" by file and line; what has no line comes first."""
    place, _, line = problem.partition(": ")[0].rpartition(":")
    return (place, int(line)) if line.isdecimal() else ("", 0)


def _read(path: Path, reader: NodeReader, chain: tuple[Path, ...]) -> Node:
    """The tree of a file with everything that it extends. `chain` holds the files that led here."""
    return _follow(reader.read(path), path, reader, chain)


def _spelled(content: Mapping[str, Any]) -> str:
    """A recipe's content as YAML. Raises RecipeError: not such plain values as a file holds."""
    import yaml

    try:
        text: str = yaml.safe_dump(json.loads(json.dumps(content, default=str)), sort_keys=False)
    except (TypeError, ValueError) as error:
        raise RecipeError([f"wanted what a file could say, found {one_line(error)}"], "recipe") from error
    return text


def _follow(tree: Node, path: Path, reader: NodeReader, chain: tuple[Path, ...]) -> Node:
    """The tree of what stands in a file with everything that it extends."""
    extends = tree.value.pop("extends", None) if isinstance(tree.value, dict) else None
    if extends is None:
        return tree
    base = _base(extends, path, reader, (*chain, path.resolve()))
    return _extend(
        base if isinstance(base.value, dict) else Node({"layers": Node(BROKEN, base.where)}, base.where), tree
    )


def _base(extends: Node, path: Path, reader: NodeReader, chain: tuple[Path, ...]) -> Node:
    """The tree of the recipe that the file at `path` extends; broken, with a report, if there is none."""
    broken = Node(BROKEN, extends.where)
    if extends.value is BROKEN:
        return broken
    if not isinstance(extends.value, str):
        reader.report(extends.where, ("extends",), f"wanted a recipe's name or path, found {show(extends.plain())}")
        return broken
    try:
        found = find_recipe(extends.value, path.parent)
    except RecipeError as error:
        reader.report(extends.where, ("extends",), error.problems[0])
        return broken
    if len(chain) >= DEEPEST:
        reader.report(
            extends.where, ("extends",), f"wanted at most {DEEPEST} recipes that extend each other, found more"
        )
        return broken
    if found.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, found))
        reader.report(extends.where, ("extends",), f"recipes extend each other in a circle: {circle}")
        return broken
    return _read(found, reader, chain)


def _extend(base: Node, child: Node) -> Node:
    """The base with everything that the child says; see the module's docstring."""
    merged = {key: node for key, node in base.value.items() if key not in OWN}
    for key, node in child.value.items():
        inherited = merged.get(key)
        if key == "layers" and inherited is not None and _lists(inherited, node):
            node = Node(_extend_rules(inherited.value, node.value), node.where)
        elif inherited is not None and isinstance(inherited.value, dict) and isinstance(node.value, dict):
            node = Node({**inherited.value, **node.value}, node.where)
        merged[key] = node
    return Node(merged, child.where)


def _lists(*nodes: Node) -> bool:
    return all(isinstance(node.value, list) for node in nodes)


def _extend_rules(base: list[Node], child: list[Node]) -> list[Node]:
    rules = list(base)
    first: list[Node] = []
    scopes = [_scope(rule) for rule in base]
    for rule in child:
        scope = _scope(rule)
        if scope is not None and scope in scopes:
            rules[scopes.index(scope)] = rule
        else:
            first.append(rule)
    return first + rules


def _scope(rule: Node) -> tuple[Any, ...] | None:
    """Which layers a rule is for, if it says so."""
    if not isinstance(rule.value, dict) or "match" not in rule.value:
        return None
    return tuple(rule.value[key].plain() if key in rule.value else None for key in ("match", "blocks", "when"))


def _override(tree: Node, text: str, reader: NodeReader) -> None:
    """Puts the value of one `key=value` into the tree."""
    key, equals, written = text.partition("=")
    flag = f"--set {text}"
    keys: Keys = tuple(int(part) if INDEX.fullmatch(part) else part for part in key.split("."))
    if not equals or "" in keys:
        reader.report(flag, (), "wanted KEY=VALUE, as in calibration.samples=32")
        return
    node = tree
    for depth, part in enumerate(keys):
        if isinstance(node.value, dict) and isinstance(part, str):
            node = node.value.setdefault(part, Node({}, flag))
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            reader.report(flag, keys[:depth], _dead_end(node, part))
            return
    node.value, node.where = reader.parse(written, lambda _: flag).value, flag


def _dead_end(node: Node, part: str | int) -> str:
    """Why a path does not go on from a node."""
    if isinstance(node.value, list):
        return f"wanted an index below {len(node.value)}, found {part!r}"
    if isinstance(node.value, dict):
        return f"wanted a key, found the index {part}"
    return f"has no keys to set, found {show(node.plain())}; set the whole of it"
