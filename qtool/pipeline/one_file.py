"""`-o NAME.gguf`: a GGUF file under the name that was asked for, and what is said about it in a folder beside it.

The folder `NAME.report` is a result like any other; the file is a second name of the one in it, which takes no room.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from qtool.errors import StorageError, UsageError
from qtool.store.files import check_file, new_file, storage_errors

SUFFIX = ".gguf"


def folder_of(out: Path) -> Path:
    """The folder of a result that is asked for under a name."""
    return out.with_suffix(".report") if out.suffix == SUFFIX else out


def described(path: Path) -> Path:
    """The folder of the result that a file is the second name of; anything else stays what it is."""
    folder = folder_of(path)
    if folder == path or not path.is_file() or not (folder / "report.json").is_file():
        return path
    return folder if any(same(file, path) for file in folder.glob(f"*{SUFFIX}")) else path


def check_one_file(out: Path, artifacts: Collection[str], split: bool, overwrite: bool) -> None:
    """Refuses what cannot become one file, before any work.

    Args:
        out: the file.
        artifacts: that the recipe exports.
        split: whether the model is cut into several files, or has one beside it.
        overwrite: replace an earlier file.

    Raises:
        UsageError: there is more to write than a GGUF file.
        StorageError: another file has its name, or it cannot be written.
    """
    if tuple(artifacts) != ("gguf",) or split:
        found = "several files" if split else ", ".join(artifacts) or "no export"
        raise UsageError(f"--out {out.name}", wanted="a recipe that exports one GGUF file, or a folder", found=found)
    check_file(out)
    if not overwrite and out.exists() and not any(same(file, out) for file in folder_of(out).glob(f"*{SUFFIX}")):
        raise StorageError("the output is occupied", found=str(out), hint="pass --overwrite to replace it")


def same(a: Path, b: Path) -> bool:
    """Whether two names are of one file, or of files with the same bytes."""
    if a.samefile(b):
        return True
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as first, b.open("rb") as second:
        while part := first.read(1 << 20):
            if part != second.read(1 << 20):
                return False
    return True


def name_file(out: Path) -> None:
    """Gives the file in the folder its second name; copies it where the file system has no second names.

    Raises:
        StorageError: the disk is full or not writable.
    """
    (source,) = folder_of(out).glob(f"*{SUFFIX}")
    with storage_errors(out), new_file(out) as partial:
        partial.unlink()
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
