"""Writes a report as JSON, Markdown and one HTML page, and reads the JSON back.

The HTML page is whole in itself (no script, nothing from the network: its content security policy says so), and both
texts are functions of the JSON: the same report gives the same bytes.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError

from qtool.checkpoint.config import read_text
from qtool.errors import CheckpointError
from qtool.report import budget, charts, meaning, quality, summary, units
from qtool.report.model import Report
from qtool.store.files import new_file
from qtool.store.markdown import code_span, escape_markdown, fence

VERSION: int = Report.model_fields["version"].default


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes report.json, report.md and report.html into an existing folder; each is whole or absent.

    Raises:
        StorageError: the disk is full or not writable.
    """
    texts = {
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.md": markdown(report),
        "report.html": html(report),
    }
    for name, text in texts.items():
        with new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def read_report(path: Path) -> Report:
    """Reads a report.json.

    Raises:
        CheckpointError: no such file, no report, damaged, or written by a newer qtool.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no report", wanted="JSON", found=error) from error
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path} is no report", wanted="an object with a version", found=type(content).__name__)
    if version > VERSION:
        hint = "read it with a newer qtool"
        raise CheckpointError(f"{path} has another version", wanted=f"at most {VERSION}", found=version, hint=hint)
    try:
        return Report.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged at {where or 'the top'}", found=first["msg"]) from error


def html(report: Report) -> str:
    """The page."""
    environment = environment_for(autoescape=True)
    return environment.get_template("page.html.j2").render(**context(report), c=charts, charts=charts.charts(report))


def markdown(report: Report) -> str:
    """The same content without plots and without the table of all layers."""
    text = environment_for(autoescape=False).get_template("page.md.j2").render(**context(report))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def context(report: Report) -> dict[str, Any]:
    """What both templates use: the report, functions on it, and its recipe as YAML."""
    recipe = json.loads(report.model_dump_json())["recipe"]
    return {
        "report": report,
        "s": summary,
        "q": quality,
        "b": budget,
        "u": units,
        "m": meaning,
        "title": f"{report.recipe_name}: {Path(report.source).name}",
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100),
    }


@cache
def environment_for(autoescape: bool) -> Environment:
    """Templates live beside this module; compiled once, which takes as long as a hundred pages."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape_markdown, "code": code_span, "fence": fence}
    return environment
