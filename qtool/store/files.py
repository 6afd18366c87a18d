"""Output that is whole or absent: temporary siblings, fsync, rename; SHA-256 of what was written.

A folder in the making is called `.NAME.XXXXXXXX.partial`, next to the final one, so that giving it its name is one
rename on one file system. The run that writes it locks it (flock on the folder itself), and the system drops that lock
when the process ends in whatever way; a partial folder without a lock is left over from a killed run, and is removed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path
from threading import Event

from qtool.errors import StorageError, cannot_write
from qtool.limits import cores
from qtool.store.exchange import recover, replace_folder
from qtool.store.lock import lock

SUMS = "SHA256SUMS"
SIGNATURE = "# written by qtool; check with: sha256sum --check SHA256SUMS\n"
HASHED: dict[tuple[int, ...], str] = {}
"""SHA-256 of files that this process wrote, by their state."""
MOST = 1 << 24
"""Characters that are read of SHA256SUMS: a hundred thousand files."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about writing below `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out`, with a SHA256SUMS file, when the block ends without an exception.

    Args:
        out: the final name; parents are created.
        overwrite: replace an earlier output of qtool. Anything else is never replaced.

    Raises:
        StorageError: `out` is occupied, or the disk is full or not writable.
    """
    out = out.resolve()
    check_free(out, overwrite)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".partial"))
        try:
            with lock(partial):
                yield partial
                write_sums(partial)
                partial.chmod(0o777 & ~_umask())
                _sync_tree(partial)
                check_free(out, overwrite)
                replace_folder(partial, out)
                _sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name for a file that becomes `path` when the block ends without an exception.

    An existing file of that name is replaced.

    Raises:
        StorageError: the disk is full or not writable, or another process writes this very file.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        partial.touch()
        with lock(partial):
            try:
                yield partial
                _sync(partial)
                partial.replace(path)
                _sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Makes sure that a file can be written, and its folder; to be called before work that would be lost.

    Raises:
        StorageError: a folder has that name, or the system refuses to write there.
    """
    if os.path.isdir(path):
        raise StorageError("the output is occupied", wanted="a file", found=f"the folder {path}", hint="choose another")
    refuse_read_only(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def check_free(out: Path, overwrite: bool = False) -> None:
    """Makes sure that an output folder can be written; to be called before work that would be lost.

    What a killed run had set aside there is brought back first.

    Raises:
        StorageError: `out` holds something that may not be replaced, or the system refuses to look or to write there.
    """
    refuse_read_only(out)
    with storage_errors(out):
        recover(out)
        if not out.exists() and not out.is_symlink():
            return
        if not out.is_dir():
            raise StorageError(
                "the output is occupied", wanted="a new folder", found=f"the file {out}", hint="choose another"
            )
        if not any(out.iterdir()):
            return
        foreign = _foreign(out)
        if foreign is not None:
            hint = "choose another folder, or move it away"
            raise StorageError("the output folder holds something else", found=str(out / foreign), hint=hint)
        if not overwrite:
            hint = "pass --overwrite to replace it, or choose another folder"
            raise StorageError("the output folder holds an earlier output", found=str(out), hint=hint)


def refuse_read_only(path: Path) -> None:
    """Raises StorageError: nothing can be made in the nearest folder above a path that exists."""
    place = next(above for above in path.absolute().parents if os.path.lexists(above))
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise cannot_write(path, OSError(error.errno, error.strerror)) from error


def sha256(path: Path, over: Event | None = None) -> str:
    """Hex digest of a file's content; of its beginning, if it is `over` before the end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not (over and over.is_set()) and (chunk := file.read(1 << 20)):
            digest.update(chunk)
    return digest.hexdigest()


def hashes(paths: Sequence[Path], over: Event | None = None) -> list[str]:
    """SHA-256 of files that nobody writes any more, several at a time; what this process has hashed is known.

    Args:
        paths: of the files.
        over: set when nobody wants to know any longer.
    """
    missing = {path: key for path in paths if (key := _state(path)) not in HASHED}
    with ThreadPoolExecutor(min(len(missing), cores()) or 1) as threads:
        found = [*threads.map(lambda path: sha256(path, over), missing)]
    if not (over and over.is_set()):
        HASHED.update(zip(missing.values(), found, strict=True))
    return [HASHED.get(_state(path), "") for path in paths]


@contextmanager
def settling(paths: Sequence[Path]) -> Iterator[None]:
    """Meanwhile files that nobody writes any more go to the disk and are hashed, for which their folder would wait.

    Raises:
        StorageError: the disk does not take one.
    """

    def bring() -> None:
        for path in paths:
            with storage_errors(path):
                _sync(path)

    over = Event()
    with ThreadPoolExecutor(2) as lanes:
        begun = lanes.submit(hashes, paths, over), lanes.submit(bring)
        try:
            yield
            _ = [each.result() for each in begun]
        finally:
            over.set()


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, and not when it is renamed."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over all other files of a folder, in alphabetical order."""
    names = [name for name in _files(folder) if name != SUMS]
    _write_sums(folder, dict(zip(names, hashes([folder / name for name in names]), strict=True)))


def renew_sums(folder: Path, names: Collection[str]) -> None:
    """Writes SHA256SUMS anew where these files were replaced; what it says of all others stays, true or not."""
    sums = read_sums(folder) | {name: sha256(folder / name) for name in names}
    with new_file(folder / SUMS) as partial:
        _write_sums(folder, sums, partial)


def _write_sums(folder: Path, sums: Mapping[str, str], path: Path | None = None) -> None:
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    (path or folder / SUMS).write_text(SIGNATURE + "".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Hex digest by file name, as SHA256SUMS has it; empty if qtool wrote none."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MOST) if file.read(len(SIGNATURE)) == SIGNATURE else ""
    rows = (line.partition("  ") for line in text.splitlines())
    return {name: digest for digest, _, name in rows}


def damaged_file(folder: Path) -> str | None:
    """A file that SHA256SUMS names and that is missing or has other content; SHA256SUMS itself if qtool wrote none.

    Raises:
        StorageError: the system refuses to read one.
    """
    sums = read_sums(folder)
    with storage_errors(folder):
        wrong = (name for name, digest in sums.items() if not _has(folder / name, digest))
        return next(wrong, None) if sums else SUMS


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _foreign(out: Path) -> str | None:
    """A file in `out` that no run of qtool wrote."""
    sums = read_sums(out)
    if not sums:  # whatever is there; it may be a whole disk
        return min(path.name for path in out.iterdir())
    return next((name for name in _files(out) if name not in {*sums, SUMS}), None)


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


def _remove_leftovers(out: Path) -> None:
    for folder in out.parent.glob(f".{glob.escape(out.name)}.????????.partial"):
        try:
            with lock(folder) as held:
                if held:  # else it may be of a run that is still alive
                    shutil.rmtree(folder, ignore_errors=True)
        except StorageError:
            continue  # a run that is still alive


def _sync_tree(folder: Path) -> None:
    for name in _files(folder):
        _sync(folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != EINVAL or not path.is_dir():  # a folder that a machine shares with a virtual one has none
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
