"""Where calibration text comes from, one document after the other, read no further than asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointError, HubError, MissingExtra

PIECE = 1 << 20
"""Characters of a text file that count as one document; large files are read piece by piece."""

FIELDS = ("messages", "conversations", "text", "content", "prompt")
"""Where rows of a dataset keep their text, tried in this order."""


def documents(source: str, tokenizer: Any, chat_template: bool) -> Iterator[str]:
    """The documents of one token source of a recipe, except `self`.

    Args:
        source: builtin, a path that ends in .txt, .jsonl or .parquet, or hf:repo[:config[:split]].
        tokenizer: lays out chat messages, if asked to.
        chat_template: use the tokenizer's chat template for rows that hold messages.

    Raises:
        CheckpointError: a missing or damaged file, or rows without text.
        MissingExtra: .parquet or hf: without the packages of the extra `data`.
        HubError: the dataset cannot be fetched.
    """
    if source == "builtin":
        return _builtin()
    if source.startswith("hf:"):
        return (_text(row, source, tokenizer, chat_template) for row in _hub_rows(source))
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no calibration file {source}", hint="give a .txt, .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        return (_text(row, source, tokenizer, chat_template) for row in _json_rows(path))
    if path.suffix == ".parquet":
        return (_text(row, source, tokenizer, chat_template) for row in _parquet_rows(path))
    return _pieces(path)


def _builtin() -> Iterator[str]:
    """Prose that comes with every Python: the language reference's topics, in alphabetical order."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of PIECE characters."""
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text", wanted="UTF-8", found=f"byte {error.start} of a piece") from error


def _json_rows(path: Path) -> Iterator[Any]:
    """One JSON value per line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise CheckpointError(f"{path}:{number} is not JSON", found=error) from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    """Rows of a Parquet file, some at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"reading {path}") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise CheckpointError(f"{path} is not a readable Parquet file", found=error) from error


def _hub_rows(source: str) -> Iterator[Any]:
    """Rows of a hub dataset, streamed; the split defaults to train."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtra("datasets", "data", f"reading {source}") from error
    repo, config, split = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    try:
        yield from load_dataset(repo, config or None, split=split or "train", streaming=True)
    except Exception as error:
        raise HubError(f"dataset {repo} cannot be read", found=" ".join(str(error).split())[:200]) from error


def _text(row: Any, source: str, tokenizer: Any, chat_template: bool) -> str:
    """The text of one row: a string, or the first known field of a mapping; messages are laid out or joined."""
    value = next((row[f] for f in FIELDS if row.get(f)), None) if isinstance(row, dict) else row
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) for m in value):
        messages = [{"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))} for m in value]
        if chat_template:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return "\n\n".join(str(m["content"]) for m in messages)
    raise CheckpointError(
        f"a row of {source} has no text", wanted=f"a field named {', '.join(FIELDS)}", found=list(row)
    )
