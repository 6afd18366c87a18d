"""A GGUF model in several files, as llama-gguf-split makes them.

    NAME-00001-of-00003.gguf    all metadata, some tensors     split.no 0
    NAME-00002-of-00003.gguf    the next tensors               split.no 1, ...

Every file says `split.no` (u16), `split.count` (u16) and `split.tensors.count` (i32, of all files together).
Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/gguf-split/gguf-split.cpp
"""

from __future__ import annotations

import re
from pathlib import Path

from qtool.checkpoint.gguf_io import GGUFFile
from qtool.errors import CheckpointError

NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
VISION = "mmproj-"
"""How names of files begin that hold a vision tower, as llama.cpp's tools call them."""
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


def part_path(path: Path, index: int, count: int) -> Path:
    """The file of a part: `index` from 0 of `count`; a model in one part has the plain name."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1:05}-of-{count:05}.gguf")


def part_of(name: str) -> tuple[int, int]:
    """(which part a file is by its name, from 0; of how many), see `part_path`."""
    match = NAME.fullmatch(name)
    return (int(match[2]) - 1, int(match[3])) if match else (0, 1)


def first_parts(folder: Path) -> list[Path]:
    """The GGUF files of a folder; of those that are parts of one model only the first, and no vision towers."""
    found = [path for path in sorted(folder.glob("*.gguf")) if part_of(path.name)[0] == 0]
    return [path for path in found if not path.name.startswith(VISION)]


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header of a model's only file, or those of all its parts.

    Args:
        path: the file, or the first part.

    Raises:
        CheckpointError: damaged, or a part is missing or belongs to something else.
    """
    file = GGUFFile(path)
    count = file.metadata.get(COUNT, 1)
    if count == 1:
        return file
    match = NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(f"{path} is one of {count!r:.20} parts", wanted=f"NAME-00001-of-{count!r:.20}.gguf")
    if file.metadata.get(NUMBER) != 0:
        raise CheckpointError(f"{path} is not the first part", hint=f"open {match[1]}-00001-of-{match[3]}.gguf")
    whole = path.with_name(f"{match[1]}.gguf")
    for index in range(1, count):
        _join(file, part_path(whole, index, count), index, count)
    if len(file.tensors) != (wanted := file.metadata.get(TENSORS)):
        raise CheckpointError(f"{path}: wrong number of tensors in all parts", wanted=wanted, found=len(file.tensors))
    return file


def _join(file: GGUFFile, path: Path, index: int, count: int) -> None:
    """Adds the tensors of a part to those of the first."""
    if not path.exists():
        raise CheckpointError(f"{file.path}: a part is missing", wanted=path.name)
    part = GGUFFile(path)
    found = part.metadata.get(NUMBER), part.metadata.get(COUNT)
    if found != (index, count):
        raise CheckpointError(f"{path} is another part", wanted=f"{index} of {count}", found=f"{found!r:.40}")
    if twice := file.tensors.keys() & part.tensors.keys():
        raise CheckpointError(f"{path} holds a tensor that an earlier part holds", found=min(twice))
    file.tensors |= part.tensors
    file.header += part.header
