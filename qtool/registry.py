"""Pluggable things by name: a name is a file stem, and the class inside is spelled alike up to case and underscores.

`qtool/methods/gptq.py` holds `GPTQ` and is called `gptq` in recipes; `qtool/artifact/compressed_tensors.py` holds
`CompressedTensors` and is called `compressed-tensors`, as its project is; formats keep the underscores that ggml gives
them (`q4_k`). Listing a room reads a directory and imports nothing; loading a name imports that one module, and
whatever is wrong in it is raised there.

Other packages add to a room through entry points. The group is "qtool." and the last word of the room ("qtool.formats",
"qtool.families"); name and class are spelled alike as here: `ternary3 = "their_package.ternary:Ternary3"`.
https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, one_line, suggestion

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ROOT = Path(__file__).parent
ROOMS = ("ops", "formats", "stats", "methods", "residuals", "transforms", "stages", "checkpoint/families", "artifact")
"""What other packages can add to."""


def names(room: str) -> list[str]:
    """Names of what `qtool/<room>/` and other packages offer, in alphabetical order.

    Modules that start with `_` are the room's own.

    Args:
        room: folder below the package, with slashes, as in "checkpoint/families".
    """
    return sorted({*_own(room), *_offered(room)})


@cache
def _own(room: str) -> frozenset[str]:
    entries = (ROOT / room).iterdir()
    stems = {e.stem for e in entries if e.suffix == ".py" or (e / "__init__.py").exists()}
    return frozenset(s.replace("_", "-") if room == "artifact" else s for s in stems if not s.startswith("_"))


@cache
def _offered(room: str) -> dict[str, tuple[EntryPoint, ...]]:
    """What other packages offer for a room, by name; several under one name if their authors did not agree."""
    from importlib.metadata import entry_points  # not for `qtool --help`: it takes as long as all of ours

    offered: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=group(room)):
        offered[entry.name].append(entry)
    return {name: tuple(entries) for name, entries in offered.items()}


def group(room: str) -> str:
    """The group of a room's entry points."""
    return f"qtool.{room.rpartition('/')[2]}"


def load(room: str, name: str) -> Any:
    """The class of that name.

    Raises:
        QtoolError: no such name, and the message suggests a near spelling; two packages offer it; or the package that
            offers it is broken.
    """
    if name not in names(room):
        raise QtoolError(f"no {room.split('/')[-1]} entry is called {name!r}", hint=suggestion(name, names(room)))
    if offered := _offered(room).get(name, ()):
        sources = [*(["qtool"] if name in _own(room) else []), *(_package(entry) for entry in offered)]
        if len(sources) > 1:
            what = f"{room.split('/')[-1]} entry {name!r} comes from several packages"
            raise QtoolError(what, found=" and ".join(sorted(sources)), hint="uninstall all but one")
        return _plugin(room, offered[0])
    return _shipped(room, name.replace("-", "_"))


@cache
def _shipped(room: str, stem: str) -> Any:
    """The class of one of our own files."""
    module = import_module(f"qtool.{room.replace('/', '.')}.{stem}")
    spelled = {_alike(attribute): attribute for attribute in vars(module)}
    return getattr(module, spelled[_alike(stem)])


def name_of(room: str, thing: type) -> str:
    """The name that a class of a room is called by, which `load` turns back into it."""
    return next((name for name in names(room) if _alike(name) == _alike(thing.__name__)), thing.__name__.lower())


def sources() -> list[Path]:
    """Every source file of qtool and of the packages that add to it."""
    from importlib.util import find_spec

    folders = {ROOT}
    tops = {entry.module.split(".")[0] for room in ROOMS for offered in _offered(room).values() for entry in offered}
    for spec in filter(None, (find_spec(top) for top in sorted(tops))):
        folders |= {Path(place) for place in spec.submodule_search_locations or filter(None, [spec.origin])}
    return [path for place in sorted(folders) for path in ([place] if place.is_file() else sorted(place.rglob("*.py")))]


def _plugin(room: str, entry: EntryPoint) -> Any:
    """The class behind an entry point. Raises QtoolError: it cannot be imported, or is not what it should be."""
    what, hint = f"{room.split('/')[-1]} entry {entry.name!r} of package {_package(entry)}", "mend or uninstall it"
    try:
        found = entry.load()
    except Exception as error:  # another's module may raise whatever it likes
        text = f"{type(error).__name__}: {one_line(error)}"
        raise QtoolError(f"{what} cannot be imported", found=text, hint=hint) from error
    base = f"qtool.{room.replace('/', '.')}._base"
    if not inspect.isclass(found) or all(parent.__module__ != base for parent in found.__mro__):
        raise QtoolError(f"{what} is wrong", wanted=f"a subclass of the one in {base}", found=entry.value, hint=hint)
    if _alike(found.__name__) != _alike(entry.name):
        wanted = "a class that is spelled like the name, up to case and underscores"
        raise QtoolError(f"{what} is wrong", wanted=wanted, found=found.__name__, hint=hint)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise QtoolError(f"{what} is wrong", wanted=f"definitions of {', '.join(missing)}", found="none", hint=hint)
    return found


def _package(entry: EntryPoint) -> str:
    """The name and version of the distribution that an entry point comes with."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module


def _alike(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
