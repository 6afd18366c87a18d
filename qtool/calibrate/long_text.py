"""Token ids of a text file of any length, those of the whole text, read no further than they are asked for.

A tokenizer takes twenty times the memory of a text. So windows of a long one are tokenized that overlap, and joined
where both windows found the same tokens at the same places: what a token is depends on what is near it. Where that is
not so (one letter a thousand times) the window grows.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qtool.calibrate.tokenizer import native, token_ids

PIECE = 1 << 20
"""Characters that are read at a time."""
OVERLAP = 1 << 12
"""Characters in front of a seam that are tokenized again, and behind it that are tokenized before."""

Placed = tuple[list[int], Sequence[int]]
"""Tokens: where each begins, in characters, and its id."""


def file_ids(path: Path, tokenizer: Any, most: int | None = None) -> tuple[Sequence[int], bool]:
    """Token ids of a file with the special tokens that the tokenizer puts around a text.

    Args:
        path: UTF-8 text.
        tokenizer: from `load_tokenizer`.
        most: ids that are needed; None: all.

    Returns:
        (ids: all of them, or at least `most`; whether what was read is white space only).

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        CheckpointError: the tokenizer cannot do it.
    """
    size = PIECE if most is None else min(PIECE, 16 * most + 2 * OVERLAP)
    with path.open(encoding="utf-8") as file:
        first = file.read(size)
        further = file.read(size)
        if not further:
            return token_ids(tokenizer, first, special=True), not first.strip()
        pieces = (piece for start in ((first, further), iter(lambda: file.read(size), "")) for piece in start)
        blank = not (first.strip() or further.strip())
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            return _whole(pieces, tokenizer, most), blank
        before, after = _ends(tokenizer)
        ids = array("I", before)
        for found in _joined(pieces, tokenizer):
            ids.extend(found)
            if most is not None and len(ids) >= most:
                return ids, blank
        return ids + array("I", after), blank


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens in front of a text and behind it."""
    whole, bare = token_ids(tokenizer, "a", special=True), token_ids(tokenizer, "a")
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def _whole(pieces: Iterable[str], tokenizer: Any, most: int | None) -> list[int]:
    """For tokenizers that say nothing about places: as much text as gives tokens enough."""
    text, ids = "", list[int]()
    for piece in pieces:
        text += piece
        if most is not None and len(ids := token_ids(tokenizer, text, special=True)) > most + OVERLAP:
            return ids
    return token_ids(tokenizer, text, special=True)


def _placed(tokenizer: Any, text: str) -> Placed:
    with native("the tokenizer cannot read a text"):
        (found,) = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
        return [start for start, _ in found.offsets], found.ids


def _joined(pieces: Iterator[str], tokenizer: Any) -> Iterator[Sequence[int]]:
    """Ids of the pieces' text, as one."""
    text = next(pieces)
    starts, ids = _placed(tokenizer, text)
    done = 0  # where in `text` tokens begin that have not been given yet
    for piece in pieces:
        seam, behind = len(text) - OVERLAP, len(text) - OVERLAP // 2
        drop = max(0, seam - OVERLAP)
        longer = text[drop:] + piece
        more_starts, more_ids = _placed(tokenizer, longer)
        old = slice(bisect_left(starts, seam), bisect_left(starts, behind))
        new = slice(bisect_left(more_starts, seam - drop), bisect_left(more_starts, behind - drop))
        agree = [s - drop for s in starts[old]] == more_starts[new] and ids[old] == more_ids[new]
        if agree and old.start < old.stop and seam >= done:
            yield ids[bisect_left(starts, done) : old.start]
            text, starts, ids, done = longer, more_starts, more_ids, seam - drop
        else:
            text += piece
            starts, ids = _placed(tokenizer, text)
    yield ids[bisect_left(starts, done) :]
