"""A Hugging Face tokenizer from the vocabulary in a GGUF file.

Transformers rebuilds vocabulary, merges and special tokens. How text is cut before merging, and whether BOS is first,
it decides by rules that depend on its version; here the file decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtool.checkpoint.gguf_io import GGUFFile
from qtool.checkpoint.pretokenizers import RULES
from qtool.errors import CheckpointError

SAME = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
}
"""Names in GGUF files -> the one of `RULES` that llama.cpp treats alike."""
BOS_FIRST = ("llama-bpe", "tekken")
"""Byte-level vocabularies whose text begins with BOS where the file says nothing; SentencePiece's always does."""


def save_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template into `folder`.

    Raises:
        CheckpointError: no vocabulary, or one whose rules are unknown.
    """
    told = file.metadata
    model, pre = told.get("tokenizer.ggml.model"), told.get("tokenizer.ggml.pre")
    pre = SAME.get(str(pre), pre)
    if model not in ("gpt2", "llama"):
        raise _unknown(file, "kind of tokenizer", "gpt2 or llama", model)
    if model == "gpt2" and pre not in RULES:
        raise _unknown(file, "pre-tokenizer", ", ".join(sorted({*RULES, *SAME})), pre)
    tokenizer = _converted(file)
    begin = told.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in BOS_FIRST)
    _begin(tokenizer, tokenizer.bos_token if begin else None)
    tokenizer.save_pretrained(folder)
    if model == "gpt2":
        _split_by(folder / "tokenizer.json", *RULES[str(pre)])


def _unknown(file: GGUFFile, what: str, wanted: str, found: Any) -> CheckpointError:
    hint = "start from the original checkpoint"
    return CheckpointError(f"{file.path}: unknown {what}", wanted=wanted, found=repr(found)[:40], hint=hint)


def _converted(file: GGUFFile) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name, local_files_only=True)
    except Exception as error:  # whatever a strange vocabulary makes the library raise
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file.path}: transformers cannot rebuild the tokenizer: {what}", hint="start from the original checkpoint"
        ) from error


def _begin(tokenizer: Any, bos: str | None) -> None:
    """Makes every encoded text begin with `bos`, or with nothing."""
    from tokenizers.processors import TemplateProcessing

    first, second = (f"{bos} ", f" {bos}:1") if bos else ("", "")
    special = [(bos, tokenizer.convert_tokens_to_ids(bos))] if bos else []
    template = TemplateProcessing(single=f"{first}$A", pair=f"{first}$A{second} $B:1", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template


def _split_by(path: Path, steps: list[dict[str, Any]], ignore_merges: bool) -> None:
    spelled = json.loads(path.read_text(encoding="utf-8"))
    spelled["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    spelled["model"]["ignore_merges"] = ignore_merges
    path.write_text(json.dumps(spelled, ensure_ascii=False, indent=2), encoding="utf-8")
