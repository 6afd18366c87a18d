"""Where calibration text comes from, one document after the other, read no further than asked for."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qtool.calibrate.chat import ChatTemplate, pair_of, turns_of
from qtool.checkpoint.config import read_text
from qtool.errors import CheckpointError, HubError, MissingExtra, one_line

PIECE = 1 << 20
"""Characters of a text file that count as one document; large files are read piece by piece."""

LINE = 1 << 26
"""Bytes of a row, at most."""
ARRAY = 1 << 28
"""Bytes of a .json file, which is read whole."""

CHATS, PLAIN = ("messages", "conversations", "conversation", "text"), ("content", "prompt")
"""Where rows of a dataset keep their text, tried in this order; what is asked and answered apart comes between."""

PATIENCE = 1000
"""Rows without text that are passed by before the first that has some."""

CODE = (
    *(
        "bisect",
        "calendar",
        "cmd",
        "copy",
        "filecmp",
        "fnmatch",
        "getopt",
        "getpass",
        "glob",
        "gzip",
        "hashlib",
        "hmac",
    ),
    *("keyword", "lzma", "nturl2path", "numbers", "operator", "pickle", "platform", "plistlib", "pprint", "queue"),
    *("random", "reprlib", "sched", "selectors", "shelve", "shlex", "shutil", "statistics", "string", "stringprep"),
    *("tempfile", "textwrap", "timeit", "token", "tokenize", "trace", "traceback", "uuid", "weakref", "zipapp"),
)
"""Modules whose source is text to calibrate with: a fixed list, because the library's content differs by machine."""

Texts = Generator[str, None, None]

Tell = Callable[[str], None]
"""Takes a remark for the user."""


def documents(source: str, tokenizer: Any, chat_template: bool, tell: Tell = lambda _: None) -> Texts:
    """The documents of one token source of a recipe, except `self`.

    Args:
        source: builtin, code, a path that ends in .txt, .json, .jsonl or .parquet, or hf:repo[:config[:split]].
        tokenizer: lays out chat messages, if asked to.
        chat_template: use the tokenizer's chat template for rows that hold messages.
        tell: told at the end how many rows had no text, and what was wrong with the first.

    Raises:
        CheckpointError: a missing or damaged file, or one without any text.
        MissingExtra: .parquet or hf: without the packages of the extra `data`.
        HubError: the dataset cannot be fetched.
    """
    if source == "builtin":
        return _builtin()
    if source == "code":
        return _code()
    template = tokenizer if chat_template else None
    if source.startswith("hf:"):
        return _texts(_hub_rows(source), source, template, tell)
    path = Path(source)
    if not os.path.isfile(path):  # nor if the system refuses to look
        hint = "give a .txt, .json, .jsonl or .parquet file"
        raise CheckpointError(f"there is no calibration file {source}", hint=hint)
    if path.suffix == ".json":
        return _texts(_json_array(path), source, template, tell)
    if path.suffix == ".jsonl":
        return _texts(_json_rows(path), source, template, tell)
    if path.suffix == ".parquet":
        return _texts(_parquet_rows(path), source, template, tell)
    return _pieces(path)


def _builtin() -> Texts:
    """Prose that comes with every Python: the language reference's topics, in alphabetical order."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _code() -> Texts:
    """Source code that comes with every Python: a fixed list of modules, those that this one has."""
    for name in CODE:
        path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if path.is_file():
            yield from _pieces(path)


def _pieces(path: Path) -> Texts:
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
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                if len(line) > LINE:
                    raise CheckpointError(f"{path}:{number} is too long", wanted=f"at most {LINE} bytes a row")
                if line.strip():
                    yield _parsed(line, f"{path}:{number}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _json_array(path: Path) -> Iterator[Any]:
    """The values of a JSON array, which may be the only one in an object; or one value a line, under the wrong name."""
    text = read_text(path, ARRAY)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _json_rows(path)
        raise CheckpointError(f"{path} is not JSON", found=one_line(error)) from error
    arrays = [part for part in value.values() if isinstance(part, list)] if isinstance(value, dict) else []
    if isinstance(value, dict) and not any(field in value for field in (*CHATS, *PLAIN)) and len(arrays) == 1:
        value = arrays[0]
    return iter(value if isinstance(value, list) else [value])


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


def _texts(rows: Iterator[Any], source: str, template: Any, tell: Tell) -> Texts:
    """The text of every row that has some; messages are laid out or joined.

    Args:
        rows: strings, mappings, or lists of messages.
        source: for error messages.
        template: the tokenizer whose chat template lays messages out; None: join them.
        tell: see `documents`.
    """
    yielded, wrong = 0, list[CheckpointError]()
    try:
        with ExitStack() as stack:
            chat = stack.enter_context(ChatTemplate(template)) if template else None
            for number, row in enumerate(rows, 1):
                try:
                    text = _text(row, f"row {number} of {source}", chat)
                except CheckpointError as error:
                    wrong.append(error)
                    if not yielded and len(wrong) >= PATIENCE:
                        break
                    continue
                yielded += 1
                yield text.encode("utf-8", "replace").decode()  # JSON can spell halves of characters
        if wrong and not yielded:
            raise wrong[0]
    finally:
        if wrong and yielded:
            rows_of = f"{len(wrong)} of {yielded + len(wrong)} rows of {source}"
            tell(f"{rows_of} have no text and are left out; the first: {wrong[0]}")


def _text(row: Any, where: str, chat: ChatTemplate | None) -> str:
    """The text of a row. Raises CheckpointError: it has none."""
    value = row
    if isinstance(row, dict):
        parts = (*(row.get(f) for f in CHATS), pair_of(row, where), *(row.get(f) for f in PLAIN))
        values = [value for value in parts if value is not None]
        value = next(filter(None, values), values[0] if values else None)
    if isinstance(value, list):
        turns = turns_of(value, where)
        return chat.lay_out(turns, where) if chat else "\n\n".join(filter(None, (turn["content"] for turn in turns)))
    if not isinstance(value, str):
        found = ", ".join(map(str, row))[:100] if isinstance(row, dict) else type(row).__name__
        wanted = f"{', '.join(CHATS + PLAIN)}, or what is asked and answered"
        raise CheckpointError(f"{where} has no text", wanted=wanted, found=found)
    return value
