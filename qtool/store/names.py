"""Where a result may go: a name that everything around it fits into, and not over the source."""

from __future__ import annotations

import os
from pathlib import Path

from qtool.checkpoint._base import Checkpoint
from qtool.errors import StorageError, UsageError, is_utf8
from qtool.store.exchange import ASIDE

LONGEST = 255
"""Bytes of a name in every file system that is in use."""
AROUND = len(".") + len(ASIDE)
"""Characters that the longest temporary name has more than that of the output."""


def output_path(out: Path, *sources: str | Path | Checkpoint) -> Path:
    """The absolute path of an output, to be called before any work.

    Args:
        out: as the user gave it.
        sources: what the result is made from: paths, names that are none, or what was opened by one.

    Raises:
        UsageError: it has no name, or one that is not UTF-8.
        StorageError: its name is too long, or replacing it would remove a source.
    """
    if not is_utf8(os.path.abspath(out)):
        raise UsageError("the output", wanted="a path in UTF-8", found=ascii(str(out)))
    try:
        out = out.expanduser()  # shells leave --out=~/x as it is
        out = out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name
        real = out.resolve()
    except (OSError, RuntimeError) as error:
        raise StorageError(f"cannot write {out}: {error}", hint="choose another output") from error
    if not out.name:
        raise UsageError("the output", wanted="a folder or file with a name", found=str(out))
    longest = LONGEST - AROUND
    if len(os.fsencode(out.name)) > longest:
        found = f"{len(os.fsencode(out.name))}: {out.name[:40]}..."
        raise StorageError("the output's name is too long", wanted=f"at most {longest} bytes", found=found)
    for source in map(_resolved, sources):
        if source is None:
            continue
        if source == real or real in source.parents or (source in real.parents and real.is_file()):
            hint = "choose another output"
            raise StorageError(f"{out} holds what the result is made from", found=str(source), hint=hint)
    return out


def _resolved(source: str | Path | Checkpoint) -> Path | None:
    """Of a file or folder; None if there is none of that name."""
    try:
        return Path(source.source if isinstance(source, Checkpoint) else source).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None
