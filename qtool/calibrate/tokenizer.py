"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from qtool.calibrate.child import Child
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.config import read_json
from qtool.errors import CheckpointError, MissingExtra, QtoolError, one_line

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""What holds a vocabulary; one of them is enough."""

SECONDS = 60.0
"""To read a tokenizer and a few words with it; the largest take one."""

WORDS = (
    "",
    " ",
    "Hello, world! It's 12345 o'clock;\r\n\tdef f(x):\n        return x ** 2  # ½ £ ² é ß",
    "你好世界 Привет мир שלום नमस्ते ٣٤٥ 🙂🙃👩‍👩‍👧 \u0000\u0007\ufffd\U0010ffff" + "a" * 1000 + " " * 100,
)
"""What a tokenizer is tried with."""

TRIAL = """
import json

def read(path):
    if path.endswith(".json"):
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, lambda text: tokenizer.encode(text).ids
    from sentencepiece import SentencePieceProcessor
    tokenizer = SentencePieceProcessor(model_file=path)
    return tokenizer, tokenizer.encode

def attempt(do, *args):
    try:
        return do(*args), ""
    except BaseException as error:
        return None, " ".join(str(error).split())[:200] or type(error).__name__

for line in sys.stdin:
    read_one, said = attempt(read, sys.argv[1])
    texts = json.loads(line) if read_one else ()
    wrong = []
    for text in texts:
        ids, why = attempt(read_one[1], text)
        wrong += [why] * bool(why)
        attempt(read_one[0].decode, ids or [])
    print(json.dumps(said or (wrong[0] if texts and len(wrong) == len(texts) else "")), flush=True)
"""
"""Answers with what is wrong with the file, or with every text; with some text, that is told when it is asked for."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer of a checkpoint, from its own files; nothing is downloaded and no code of it is run.

    A tokenizer.json says everything, so it is taken as it is, except that it never cuts or pads texts. For other files
    AutoTokenizer has to find the class that reads them, which takes a second of imports. Native code reads the files in
    a process of its own first, since some of them abort it.

    Raises:
        CheckpointError: it has none, or one that transformers cannot read.
        MissingExtra: there is SentencePiece's file only, and the packages that read it are missing.
    """
    name = next((name for name in FILES if name in checkpoint.files), None)
    if name is None:
        raise CheckpointError(f"{checkpoint.source} has no tokenizer", wanted=f"one of {', '.join(FILES)}")
    path = checkpoint.files[name]
    settings = checkpoint.files.get("tokenizer_config.json")
    if name == "tokenizer.model":
        require_sentencepiece()
    what = f"the tokenizer of {checkpoint.source} cannot be read"
    own = settings is not None and "auto_map" in read_json(settings)
    if name != "vocab.json":
        found = path.stat()
        try_tokenizer(path, what, (found.st_size, found.st_mtime_ns))
    with native(what):
        tokenizer = _from_json(path.parent) if name == "tokenizer.json" and not own else _from_any(path.parent)
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_truncation()
            backend.no_padding()
    return tokenizer


@cache
def try_tokenizer(path: Path, what: str, _stamp: tuple[int, int]) -> None:
    """Reads a tokenizer in another process, once for each state of the file.

    Raises:
        CheckpointError: that process says that it cannot be read, ends, or hangs.
    """
    with Child(TRIAL, what, str(path)) as child:
        child.send(WORDS)
        import_module("transformers")  # takes as long
        if said := child.answer(SECONDS):
            raise CheckpointError(what, found=said)


@contextmanager
def native(what: str) -> Iterator[None]:
    """Turns whatever a tokenizer raises, panics of Rust included, which are no `Exception`, into a CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, QtoolError):
        raise
    except BaseException as error:
        raise CheckpointError(what, found=one_line(error)) from error


def require_sentencepiece() -> None:
    """Raises MissingExtra: a package is missing that transformers reads tokenizer.model with."""
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        try:
            import_module(module)
        except ImportError:
            raise MissingExtra(package, "sentencepiece", "a model whose only tokenizer is tokenizer.model") from None


def _from_json(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _from_any(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Ids of a text of any length; special tokens that are spelled out in it count as such.

    Args:
        tokenizer: from `load_tokenizer`.
        text: what to tokenize.
        special: put special tokens around it, where the tokenizer does so.

    Raises:
        CheckpointError: the tokenizer cannot do it.
    """
    return batch_ids(tokenizer, [text], special)[0]


def batch_ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    """Ids of each of some texts, several of which are tokenized at a time; see `token_ids`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    with native("the tokenizer cannot read a text"):
        if backend is None:
            options = {"add_special_tokens": special, "truncation": False, "padding": False, "verbose": False}
            return [list(tokenizer(text, **options)["input_ids"]) for text in texts]
        found = backend.encode_batch_fast(texts, add_special_tokens=special)  # without positions, twice as fast
        return [list(encoding.ids) for encoding in found]


def beginning(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    ids, bare = token_ids(tokenizer, "a", special=True), token_ids(tokenizer, "a")
    return int(ids[0]) if ids and ids[:1] != bare[:1] else None
