"""A family of GGUF files as one repository of the hub: the files under their usual names, one card, the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qtool.checkpoint.gguf_parts import part_of, part_path
from qtool.report.family_card import Member, family_card
from qtool.report.model import Report
from qtool.store.files import storage_errors


@contextmanager
def repository(out: Path, reports: Sequence[Report], pages: Sequence[str], name: str) -> Iterator[Path]:
    """A folder with what is uploaded, which is removed afterwards; its large files take no room of their own.

    Args:
        out: folder of the family.
        reports: of its members.
        pages: files in it that go along.
        name: of the repository.

    Raises:
        StorageError: the disk refuses.
    """
    folder = out.with_name(f".{out.name}.upload.partial")
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        with storage_errors(folder):
            members = [placed(out / report.recipe_name, report, folder) for report in reports]
            for page in pages:
                shutil.copy(out / page, folder / page)
            (folder / "README.md").write_text(family_card(members, name), encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def placed(result: Path, report: Report, folder: Path) -> Member:
    """Gives the files of a result their usual names in a folder."""
    (artifact,) = report.artifacts
    stem = f"{report.base_model.rstrip('/').rpartition('/')[2]}-{quantization(report.recipe_name)}"
    names = []
    for file in sorted(f.name for f in artifact.files if f.name.endswith(".gguf")):
        index, count = part_of(file)
        names.append(part_path(Path(f"{stem}.gguf"), index, count).name)
        link(result / artifact.path / file, folder / names[-1])
    return Member(report, tuple(names))


def quantization(recipe: str) -> str:
    """What file names call the result of a recipe: "Q4_K_M", "Q4_K_M-fit"."""
    kind, _, rest = recipe.removeprefix("gguf-").partition("-")
    return kind.upper() + (f"-{rest}" if rest else "")


def link(file: Path, name: Path) -> None:
    """Gives a file a second name; copies it where the file system has no second names."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy(file, name)
