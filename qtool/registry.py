"""Pluggable things by name: a name is a file stem, and the class inside is spelled alike up to case and underscores.

`qtool/methods/gptq.py` holds `GPTQ` and is called `gptq` in recipes; `qtool/artifact/compressed_tensors.py` holds
`CompressedTensors` and is called `compressed-tensors`, as its project is; formats keep the underscores that ggml gives
them (`q4_k`). Listing a room reads a directory and imports nothing; loading a name imports that one module, and
whatever is wrong in it is raised there.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from qtool.errors import QtoolError, nearest

ROOT = Path(__file__).parent


def names(room: str) -> list[str]:
    """Names of what `qtool/<room>/` holds, in alphabetical order; modules that start with `_` are the room's own.

    Args:
        room: folder below the package, with slashes, as in "checkpoint/families".
    """
    return list(_names(room))


@cache
def _names(room: str) -> tuple[str, ...]:
    entries = (ROOT / room).iterdir()
    stems = {e.stem for e in entries if e.suffix == ".py" or (e / "__init__.py").exists()}
    return tuple(sorted(s.replace("_", "-") if room == "artifact" else s for s in stems if not s.startswith("_")))


def load(room: str, name: str) -> Any:
    """The class that the module of that name holds.

    Raises:
        QtoolError: no such name; the message suggests a near spelling.
    """
    if name not in names(room):
        raise QtoolError(f"no {room.split('/')[-1]} entry is called {name!r}", hint=nearest(name, names(room)))
    stem = name.replace("-", "_")
    module = import_module(f"qtool.{room.replace('/', '.')}.{stem}")
    spelled = {attribute.lower().replace("_", ""): attribute for attribute in vars(module)}
    return getattr(module, spelled[stem.replace("_", "")])
