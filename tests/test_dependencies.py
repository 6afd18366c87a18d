"""What is said about versions in one place agrees with the others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from qtool.tested import NEWEST
from scripts.newest import pins

ROOT = Path(__file__).parents[1]
TORCH = "torch"


def plain(name: str) -> str:
    """A package's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """(6, 0, 1) of 6.0.1, without zeros at the end."""
    found = [int(n) for n in version.split(".")]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def bounds() -> dict[str, str]:
    """Lower bounds of all requirements of pyproject.toml, by package."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["llamacpp"], *extras["dev"]]
    return {plain(name): version for name, version in (re.fullmatch(r"([\w.-]+)>=([\d.]+)", r).groups() for r in asked)}


def test_the_oldest_releases_are_those_that_are_allowed():
    oldest, allowed = {plain(n): v for n, v in pins(ROOT / "constraints-oldest.txt").items()}, bounds()
    tried = {name: oldest[name] for name in oldest if name in allowed}
    assert {n: numbers(v) for n, v in tried.items()} == {n: numbers(allowed[n]) for n in tried}
    required = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    missing = {plain(n) for n in re.findall(r'"([\w-]+)>=', required)} - tried.keys()
    assert missing == {TORCH}, "what is required is tried"


def test_the_newest_releases_are_those_that_users_are_told_of():
    newest, usual = pins(ROOT / "constraints-newest.txt"), pins(ROOT / "constraints.txt")
    assert {name: (usual | newest)[name] for name in NEWEST} == NEWEST
    assert all(numbers(newest[name]) >= numbers(usual[name]) for name in newest)
