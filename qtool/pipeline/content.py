"""The first look at a source: whether its files are as qtool wrote them, and whether its numbers are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from threading import Event as Flag

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.checkpoint.open import local
from qtool.checkpoint.parts import parts_of
from qtool.checkpoint.raw_bytes import Stretch
from qtool.errors import CheckpointError, reading
from qtool.numerics.checks import finite
from qtool.numerics.checksum import Checksum
from qtool.numerics.metrics import all_finite
from qtool.numerics.threads.parallel import lanes, shares, side_by_side
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.requantize import is_finite, stored_matrix
from qtool.pipeline.rows import row_parts
from qtool.store.files import SUMS, read_sums, sha256

SIDE = {".md", ".html", "report.json"}
"""Suffixes and names of what says something about a model and is none of it: people add to it, or leave it out."""


@contextmanager
def content_beside(job: Job) -> Iterator[Callable[[], str]]:
    """Gives what waits for the checksum of the source, which is read meanwhile; see `reading_beside`."""
    if "content" in job.shared.known:
        yield partial(content_of, job)
    else:
        with reading_beside(job.original, job.ranks) as checksum:
            yield partial(job.shared.once, "content", checksum)


def content_of(job: Job) -> str:
    """Checksum of the source, see `read_content`."""
    return job.shared.once("content", partial(read_content, job.original, job.ranks))


def read_content(checkpoint: Checkpoint, ranks: Ranks = ALONE) -> str:
    """Reads every tensor once, part by part, and several side by side.

    Args:
        checkpoint: whose.
        ranks: who reads some of them.

    Returns:
        A checksum of all that was read, so that a run which continues sees whether it still has the same source;
        `Checkpoint.fingerprint`, which is there before anything else is, looks at samples only.

    Raises:
        NumericsError: a tensor holds NaN or infinity.
        CheckpointError: one cannot be read.
    """
    with reading_beside(checkpoint, ranks) as checksum:
        return checksum()


@contextmanager
def reading_beside(checkpoint: Checkpoint, ranks: Ranks = ALONE) -> Iterator[Callable[[], str]]:
    """`read_content` on other threads than this one, which does something else meanwhile, such as importing modules.

    Gives what waits for the checksum, and raises what reading raised; leaving without it ends the reading.
    """
    names, over = checkpoint.names(), Flag()
    mine, among = names[ranks.share(len(names))], shares(len(names))

    def read(name: str) -> str:
        return "" if over.is_set() else read_tensor(checkpoint, name)

    @cache
    def checksum() -> str:
        found = dict[str, str]()
        for part in ranks.gather(dict(zip(mine, begun.result(), strict=True))):
            found |= part
        return hashlib.blake2b("".join(found[name] for name in names).encode(), digest_size=16).hexdigest()

    (lane,) = lanes(1, torch.get_num_threads())
    with lane:
        begun = lane.submit(side_by_side, read, mine, among)
        try:
            yield checksum
        finally:
            over.set()


def read_tensor(checkpoint: Checkpoint, name: str) -> str:
    """Checksum of one tensor. For errors, see `read_content`."""
    checksum, module = Checksum(), name.removesuffix(".weight")
    if isinstance(checkpoint, QuantizedCheckpoint) and (parts := parts_of(checkpoint, module)):
        for part, place in parts.places.items():
            pieces = checked(partial(parts.check, part), place)
            checksum.grow(f"{name} {checkpoint.layers[module].format.label} {part} {parts.infos[part]}", pieces)
        return checksum.hexdigest()
    stored = stored_matrix(checkpoint, module)
    if stored:
        quantized = stored.quantized
        checksum.add(f"{name} {quantized.format.label}", quantized.codes)
        for key, parameter in sorted(quantized.params.items()):
            checksum.add(f"{name} {key}", parameter)
        if is_finite(stored):
            return checksum.hexdigest()
    for start, stop in row_parts(checkpoint.info(name).shape):
        rows = checkpoint.rows(name, start, stop)
        checksum.add(name, rows)
        bound = not rows.shape and bool(rows.isinf())  # towers clip inputs between such numbers, or do not
        if not all_finite(rows) and not bound:
            finite(checkpoint.tensor(name), name)  # says where in the whole
    return checksum.hexdigest()


def checked(check: Callable[[Tensor], None], place: Stretch) -> Iterator[Tensor]:
    """Bytes of a file in pieces, each of which is checked."""
    for piece in place.pieces():
        check(piece)
        yield piece


def refuse_changed(source: str, listener: Listener) -> None:
    """Holds the files of a model against the SHA256SUMS that qtool wrote beside them, which takes a read of each.

    Of a folder all that is named there has to be as it was written; of a GGUF file, it and those of its kind.

    Args:
        source: what the user called it; a hub id is left to the hub's client, which checks what it downloads.
        listener: told of each file, for that takes a second per gigabyte or two.

    Raises:
        CheckpointError: a file is missing, is not as it was written, or is none of the folder's.
    """
    path = local(source)
    with reading(path):
        folder = path if path.is_dir() else path.parent
        sums = {name: digest for name, digest in read_sums(folder).items() if not SIDE & {name, Path(name).suffix}}
        if path != folder:
            sums = {name: digest for name, digest in sums.items() if path.is_file() and name.endswith(path.suffix)}
        for done, (name, digest) in enumerate(sums.items()):
            listener(Event("check", done, len(sums), name))
            changed = wrong(folder, name, digest)
            if changed:
                hint = "make or copy it anew, or remove SHA256SUMS to use it as it is"
                raise CheckpointError(f"{folder / name} is not as it was written: {changed}", hint=hint)
        if sums:
            listener(Event("check", len(sums), len(sums), SUMS))


def wrong(folder: Path, name: str, digest: str) -> str | None:
    """How a file differs from what SHA256SUMS says; None if it does not."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{SUMS} names a file elsewhere"
    if not (folder / name).is_file():
        return "it is missing"
    return None if sha256(folder / name) == digest else f"{SUMS} has another hash"
