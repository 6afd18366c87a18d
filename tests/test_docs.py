"""What the pages say is so: generated parts are current, commands parse, recipes and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from qtool.cli.app import app
from scripts import docs

ROOT = Path(__file__).parents[1]
PAGES = [*docs.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
QUOTED = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^(?: {4}|#\s+)\$? ?(qtool (?:[^#\n]*\\\n)*[^#\n]+)", re.MULTILINE)
OURS = re.compile(
    r"(?:qtool|docs|tests|recipes|scripts|benchmarks|\.ci)/[\w./-]*|\w+\.toml|constraints\.txt|Makefile|LICENSE"
)


def name(path):
    """Test id of a page."""
    return str(path.relative_to(ROOT))


def command_lines(text):
    """Every `qtool ...` of an indented block, of inline code, or of a recipe's comments."""
    lines = [re.sub(r"\\\n[# ]*", " ", line) for line in BLOCK.findall(text)]
    lines += [code for code in QUOTED.findall(text) if code.startswith("qtool ")]
    return [line.strip() for line in lines if "[OPTIONS]" not in line]


def parse(line):
    """Parses a command line without running it; Typer raises what is wrong. `qtool plan` alone only names a command."""
    command, arguments = typer.main.get_command(app), shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]
    while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
        command = command.commands[arguments.pop(0)]
    if hasattr(command, "commands"):  # options of a group act while they are parsed, so they are only looked up
        assert set(arguments) <= {flag for option in command.params for flag in option.opts} | {"--help"}, line
    elif arguments:
        command.make_context(command.name, arguments)


@pytest.mark.parametrize("page", docs.pages(), ids=name)
def test_generated_parts_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert docs.render(text) == text, "run `make docs`"
    assert len(docs.PART.findall(text)) == text.count("<!-- begin ") == text.count("<!-- end ")


def test_every_part_is_used_somewhere():
    used = {part[1] for page in docs.pages() for part in docs.PART.findall(page.read_text(encoding="utf-8"))}
    assert used == set(docs.PARTS)


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=name)
def test_command_lines_parse_and_name_recipes_that_ship(page):
    shipped = {path.stem for path in RECIPES}
    for line in command_lines(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except typer.Exit as stop:
            assert stop.exit_code == 0, line
        recipe = re.search(r"(?:--recipe|-r)[ =](\S+)", line)
        if recipe and not recipe[1].isupper() and not recipe[1].endswith(".yaml"):
            assert recipe[1] in shipped, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    for code in QUOTED.findall(text):
        for path in OURS.findall(code) if OURS.fullmatch(code) else ():
            if not re.search(r"[A-Z]{3}", path) and not (ROOT / path).exists():
                missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    named = re.findall(r"^ {4}make ([\w-]+)|`make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {first or second for first, second in named} <= set(targets)


@pytest.mark.parametrize(
    "line", ["qtool quantise MODEL", "qtool plan MODEL --recipe x --nope", "qtool recipes shw", "qtool plan MODEL"]
)
def test_a_wrong_command_line_is_seen(line):
    with pytest.raises((KeyError, typer.TyperException)):
        parse(line)
