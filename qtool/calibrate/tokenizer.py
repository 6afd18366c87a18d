"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.config import read_json
from qtool.errors import CheckpointError, MissingExtra, one_line

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""What holds a vocabulary; one of them is enough."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer of a checkpoint, from its own files; nothing is downloaded and no code of it is run.

    A tokenizer.json says everything, so it is taken as it is. For other files AutoTokenizer has to find the class that
    reads them, which takes a second of imports.

    Raises:
        CheckpointError: it has none, or one that transformers cannot read.
        MissingExtra: there is SentencePiece's file only, and the packages that read it are missing.
    """
    folder = next((checkpoint.files[name].parent for name in FILES if name in checkpoint.files), None)
    if folder is None:
        raise CheckpointError(f"{checkpoint.source} has no tokenizer", wanted=f"one of {', '.join(FILES)}")
    settings = checkpoint.files.get("tokenizer_config.json")
    if "tokenizer.json" not in checkpoint.files and "tokenizer.model" in checkpoint.files:
        require_sentencepiece()
    try:
        if "tokenizer.json" in checkpoint.files and not (settings and "auto_map" in read_json(settings)):
            return _from_json(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones on damaged files
        raise CheckpointError(f"the tokenizer of {checkpoint.source} cannot be read", found=one_line(error)) from error


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


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Ids of a text of any length; special tokens that are spelled out in it count as such.

    Args:
        tokenizer: from `load_tokenizer`.
        text: what to tokenize.
        special: put special tokens around it, where the tokenizer does so.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=special)  # without positions, twice as fast
    return list(encoding.ids)
