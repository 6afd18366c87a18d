"""Where calibration text comes from, one document after the other, read no further than asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointError, HubError, MissingExtra, one_line

PIECE = 1 << 20
"""Characters of a text file that count as one document; large files are read piece by piece."""

FIELDS = ("messages", "conversations", "text", "content", "prompt")
"""Where rows of a dataset keep their text, tried in this order."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Who speaks in rows of ShareGPT's kind, in the words of chat templates."""


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
    template = tokenizer if chat_template else None
    if source.startswith("hf:"):
        return _texts(_hub_rows(source), source, template)
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no calibration file {source}", hint="give a .txt, .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        return _texts(_json_rows(path), source, template)
    if path.suffix == ".parquet":
        return _texts(_parquet_rows(path), source, template)
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
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _json_rows(path: Path) -> Iterator[Any]:
    """One JSON value per line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, f"{path}:{number}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON", found=one_line(error)) from error


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
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable Parquet file", found=one_line(error)) from error


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
        raise HubError(f"dataset {repo} cannot be read", found=one_line(error)) from error


def _texts(rows: Iterator[Any], source: str, template: Any) -> Iterator[str]:
    """The text of every row: a string, or the first known field of a mapping; messages are laid out or joined.

    Args:
        rows: strings or mappings.
        source: for error messages.
        template: the tokenizer whose chat template lays messages out; None: join them.
    """
    for number, row in enumerate(rows, 1):
        fields = [row[f] for f in FIELDS if row.get(f) is not None] if isinstance(row, dict) else [row]
        value = next(filter(None, fields), fields[0] if fields else None)
        where = f"row {number} of {source}"
        text = _conversation(value, where, template) if isinstance(value, list) else value
        if not isinstance(text, str):
            found = ", ".join(map(str, row))[:100] if isinstance(row, dict) else type(row).__name__
            raise CheckpointError(f"{where} has no text", wanted=f"one of {', '.join(FIELDS)}", found=found)
        yield text.encode("utf-8", "replace").decode()  # JSON can spell halves of characters


def _conversation(messages: list[Any], where: str, template: Any) -> str:
    """One text of messages, {role, content} or {from, value} each."""
    turns = []
    for message in messages:
        said = message if isinstance(message, dict) else {}
        role, content = said.get("role", said.get("from")), said.get("content", said.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise CheckpointError(f"a message of {where}", wanted="text as role and content", found=str(message)[:100])
        turns.append({"role": ROLES.get(role, role), "content": content})
    if template is None:
        return "\n\n".join(turn["content"] for turn in turns)
    try:
        return str(template.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # templates are programs that come with the model
        raise CheckpointError(f"the chat template cannot lay out {where}", found=one_line(error)) from error
