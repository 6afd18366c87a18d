"""Writes the generated parts of README.md and docs/: what stands between `<!-- begin X -->` and `<!-- end X -->`.

Each part is made from what the program itself knows: registries, recipe schema, command line, error classes. Run it
with `make docs`; a test fails if a page differs from what this writes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from benchmarks import divided, learning, schemes, system, tables
from benchmarks import stages as timed
from qtool import errors, registry
from qtool.checkpoint._base import Layer, Module
from qtool.cli.app import app
from qtool.cli.boundary import ENDING, INTERRUPTED
from qtool.cli.options import filled
from qtool.formats._spelling import parse_format
from qtool.recipe.json_schema import json_schema
from qtool.recipe.load import list_recipes

ROOT = Path(__file__).parents[1]
NAMED = {"methods": "Method", "residuals": "Residual", "transforms": "Transform", "stages": "Spec"}
"""Rooms whose things recipes name with options, and what the schema calls them."""
PART = re.compile(r"(<!-- begin ([\w-]+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with its generated parts made anew."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]().strip()}\n{part[4]}", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def exit_codes() -> str:
    """One row per error class, and the two codes that are none."""
    tree = [errors.QtoolError]
    for kind in tree:
        tree.extend(kind.__subclasses__())
    own = {k.exit_code: (k.__name__, inspect.cleandoc(k.__doc__ or "")) for k in tree if "exit_code" in vars(k)}
    own |= {0: ("", "Done."), INTERRUPTED: ("", "Interrupted.")}
    own |= {128 + number: ("", f"Ended by {number.name}.") for number in ENDING}
    own[1] = (own[1][0], "Anything else that went wrong.")
    return table(("code", "error", "meaning"), [(str(code), *own[code]) for code in sorted(own)])


def commands() -> str:
    """Usage and options of every command, from the Typer app."""
    parts = []

    def walk(command: Any, context: typer.Context) -> None:
        if subcommands := getattr(command, "commands", None):
            for name, inner in subcommands.items():
                walk(inner, typer.Context(inner, info_name=name, parent=context))
            return
        usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
        records = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
        rows = [(f"`{flags}`", " ".join(filled(text).split())) for flags, text in records if "--help" not in flags]
        text = inspect.cleandoc(command.help or "")
        parts.append(f"## {context.command_path}\n\n    {usage}\n\n{text}\n\n" + table(("", ""), rows))

    root = typer.main.get_command(app)
    walk(root, typer.Context(root, info_name="qtool"))
    return "\n\n".join(parts)


def chapters(room: str) -> str:
    """What every module of a registry says about itself, and the options of its class."""
    parts = []
    for name in registry.names(room):
        schema = options_of(room, name)
        table_ = "\n\n" + options(schema) if schema.get("properties") else ""
        parts.append(f"## {name}\n\n{about(room, name)}{table_}")
    return "\n\n".join(parts)


def about(room: str, name: str) -> str:
    """The docstring of a registered module."""
    module = import_module(f"qtool.{room.replace('/', '.')}.{name.replace('-', '_')}")
    return inspect.cleandoc(module.__doc__ or "")


def options_of(room: str, name: str) -> dict[str, Any]:
    """The part of the recipe schema that describes a registered format, method or transform; empty for an artifact."""
    if room == "formats":
        kinds = json_schema()["$defs"]["Format"]["anyOf"][1:]
        (found,) = (kind for kind in kinds if kind["properties"]["type"] == {"const": name})
        return {**found, "properties": {k: v for k, v in found["properties"].items() if k != "type"}}
    if room in NAMED:
        kinds = json_schema()["$defs"][NAMED[room]]["anyOf"][1:]
        return dict(next(kind["properties"][name] for kind in kinds if name in kind["properties"]))
    return {}


def options(schema: dict[str, Any]) -> str:
    """The properties of a JSON Schema object as a table."""
    rows = []
    for key, value in schema["properties"].items():
        default = "required" if key in schema.get("required", ()) else spell(value.get("default"))
        rows.append((f"`{key}`", admits(value), default, value.get("description", "")))
    return table(("key", "type", "default", "meaning"), rows)


def spell(value: Any) -> str:
    """A default as YAML has it; nothing for nothing."""
    if value in (None, "", [], {}) or isinstance(value, dict):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def admits(schema: dict[str, Any]) -> str:
    """What a JSON Schema admits, in words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2].lower())
    several = schema.get("anyOf") or schema.get("oneOf") or ()
    words = [admits(each) for each in several if each.get("type") != "null"]
    words += [spell(value) for value in schema.get("enum", [schema["const"]] if "const" in schema else [])]
    if words:
        return " or ".join(words)
    if schema["type"] == "array":
        return f"list of {admits(schema['items'])}s"
    name = {"object": "mapping", "string": "text"}.get(schema["type"], schema["type"])
    bounds = [f"{word} {schema[key]}" for key, word in BOUNDS.items() if key in schema]
    return " ".join((name, *bounds))


BOUNDS = {"minimum": "from", "maximum": "to", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def families() -> str:
    """The model families: name, what they are, source."""
    rows = []
    for name in registry.names("checkpoint/families"):
        rows.append((f"`{name}`", about("checkpoint/families", name).split("\n\n")[0].replace("\n", " ")))
    return table(("model_type", "what"), rows)


def recipe() -> str:
    """The recipe grammar: a table for the whole, and one for each of its parts."""
    schema = json_schema()
    places = {
        "calibration": "Calibration",
        "calibration.data[]": "Source",
        "calibration.token_weights": "TokenWeights",
        "layers[]": "Rule",
    }
    places |= {"layers[].when": "When", "kv_cache": "KVCache", "export[]": "Export", "eval": "Eval"}
    parts = [options(schema)]
    for place, name in places.items():
        part = schema["$defs"][name]
        parts.append(f"## {place}\n\n{part['description']}\n\n{options(part)}")
    return "\n\n".join(parts)


def recipes() -> str:
    """The recipes that ship."""
    rows = [(f"[{e.name}](../recipes/{e.path.name})", e.description) for e in list_recipes()]
    return table(("recipe", "what for"), rows)


def support() -> str:
    """Which artifact holds which format exactly, and who reads it."""
    artifacts = {name: registry.load("artifact", name)() for name in registry.names("artifact")}
    rows = []
    for label, layer in layers():
        carried = (a.can_carry(SOME_MODULE, layer, "source").possible for a in artifacts.values())
        rows.append((label, *("yes" if possible else "no" for possible in carried)))
    readers = ("read by", *(", ".join(artifact.runtimes) for artifact in artifacts.values()))
    return table(("format", *artifacts), [*rows, readers])


SOME_MODULE = Module("model.layers.0.mlp.down_proj", (), "linear", "down", 0, "mlp_mid", None, (1024, 1024))


ROUNDED = (
    ("int8-channel", "int8-token"),
    ("int8-channel", "int8-tensor"),
    ("int4-g128", "int8-token"),
    ("int4-g128", "fp8-token"),
    ("fp8-channel", "fp8-token"),
    ("fp8-tensor", "fp8-tensor"),
    ("fp8-block", "fp8-g128"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
)
"""Weights and inputs that GPU runtimes multiply."""


def layers() -> Iterator[tuple[str, Layer]]:
    """Every format that has a name without options, an example or more of the others, and rounded inputs."""
    for name in registry.names("formats"):
        kind = registry.load("formats", name)
        for example in (name,) if kind.parse(name) else kind.examples:
            if not example.endswith("-token"):  # one scale per token: a format of inputs
                yield f"`{example}`", Layer(parse_format(example))
    for weights, inputs in ROUNDED:
        yield f"`{weights}`, inputs `{inputs}`", Layer(parse_format(weights), parse_format(inputs))


def study(name: str) -> str:
    """A table of docs/rewrites.md, and its plot where there is one."""
    from benchmarks import curves  # which imports tables from here

    drawn = (curves.FOLDER / curves.file_of(name)).exists()
    header, rows = tables.rows(name)
    known = [row for row in rows if any(row[1:])]
    if not known:
        return f"Not measured yet: `python -m benchmarks --only tables --table {name}` does it."
    seen = [j for j in range(len(header)) if any(row[j] for row in known)]
    shown = table([header[j] for j in seen], [[row[j] for j in seen] for row in known])
    return shown + (f"\n\n![{curves.PLOTS[name].label}]({curves.file_of(name)})" if drawn else "")


PARTS: dict[str, Callable[[], str]] = {
    "artifacts": lambda: chapters("artifact"),
    "commands": commands,
    "exit-codes": exit_codes,
    "families": families,
    "formats": lambda: chapters("formats"),
    "siblings": lambda: table(divided.SIBLINGS, list(divided.sibling_rows())),
    "ways": lambda: table(divided.WAYS, rows) if (rows := list(divided.way_rows())) else "",
    "learning": lambda: table(learning.HEADER, list(learning.rows())),
    "methods": lambda: chapters("methods"),
    "recipe": recipe,
    "recipes": recipes,
    "residuals": lambda: chapters("residuals"),
    "schemes": lambda: table(schemes.HEADER, list(schemes.rows())),
    "stages": lambda: chapters("stages"),
    "support": support,
    "systems": lambda: table(system.HEADER, list(system.rows())),
    "times": lambda: table(timed.TITLES, rows) if (rows := list(timed.rows())) else "",
    "transforms": lambda: chapters("transforms"),
    **{f"table-{name}": partial(study, name) for name in tables.TABLES},
}


def main() -> None:
    """Rewrites what is out of date."""
    for page in pages():
        old = page.read_text(encoding="utf-8")
        if (new := render(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
