"""Writes the generated parts of README.md and docs/: what stands between `<!-- begin X -->` and `<!-- end X -->`.

Each part is made from what the program itself knows: registries, recipe schema, command line, error classes. Run it
with `make docs`; a test fails if a page differs from what this writes.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtool import errors, registry

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- begin ([\w-]+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with its generated parts made anew."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]().strip()}\n{part[4]}", text)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def sentence(doc: str | None) -> str:
    """First paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())


def exit_codes() -> str:
    """One row per error class, and the two codes that are none."""
    tree = [errors.QtoolError]
    for kind in tree:
        tree.extend(kind.__subclasses__())
    own = [kind for kind in tree if "exit_code" in vars(kind)]
    rows = [(str(k.exit_code), k.__name__, sentence(k.__doc__)) for k in sorted(own, key=lambda k: k.exit_code)]
    rows[0] = ("1", "QtoolError", "Anything else that went wrong, expected or not.")
    rows.insert(0, ("0", "", "Done."))
    return table(("code", "error", "meaning"), [*rows, ("130", "", "Interrupted; the same command continues.")])


def commands() -> str:
    """Usage and options of every command, from the Typer app."""
    import typer

    from qtool.cli.app import app

    root = typer.main.get_command(app)
    chapters = []

    def walk(command: Any, context: typer.Context) -> None:
        if subcommands := getattr(command, "commands", None):
            for name, inner in subcommands.items():
                walk(inner, typer.Context(inner, info_name=name, parent=context))
            return
        usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
        records = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
        rows = [(f"`{flags}`", " ".join(text.split())) for flags, text in records if flags != "--help"]
        help_text = inspect.cleandoc(command.help or "")
        chapters.append(f"## {context.command_path}\n\n    {usage}\n\n{help_text}\n\n{table(('', ''), rows)}")

    walk(root, typer.Context(root, info_name="qtool"))
    return "\n\n".join(chapters)


def chapters(room: str) -> str:
    """What every module of a registry says about itself, and the options of its class."""
    parts = []
    for name in registry.names(room):
        entry = registry.load(room, name)
        module = sys.modules[entry.__module__]
        options = [(f"`{key}`", f"`{default(field)}`") for key, field in getattr(entry, "model_fields", {}).items()]
        about = attributes(entry)
        rows = [(key, value, about.get(key.strip("`"), "")) for key, value in options]
        body = f"## {name}\n\n{inspect.cleandoc(module.__doc__ or '')}"
        parts.append(body + ("\n\n" + table(("option", "default", "meaning"), rows) if rows else ""))
    return "\n\n".join(parts)


def default(field: Any) -> str:
    """A pydantic field's default, as YAML would spell it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def attributes(entry: type) -> dict[str, str]:
    """The `Attributes:` sections of a class and its bases, by name."""
    found: dict[str, str] = {}
    for kind in reversed(entry.__mro__):
        section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        lines = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        found |= {name: " ".join(text.split()) for name, text in lines}
    return found


PARTS: dict[str, Callable[[], str]] = {
    "artifacts": lambda: chapters("artifact"),
    "commands": commands,
    "exit-codes": exit_codes,
    "families": lambda: chapters("checkpoint/families"),
    "formats": lambda: chapters("formats"),
    "methods": lambda: chapters("methods"),
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
