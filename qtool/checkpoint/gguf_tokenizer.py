"""A Hugging Face tokenizer from the vocabulary in a GGUF file: tokenizer.json, spelled out.

Two kinds are known: byte-level BPE, whose splitting rules GGUF names (`pretokenizers.py`), and SentencePiece's BPE,
which has scores instead of merges. Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

import json
import re
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
PHI3 = re.compile("phi-?3", re.IGNORECASE)
"""In models of such a name llama.cpp drops the blanks behind special tokens, but for some."""
PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def save_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template into `folder`.

    Raises:
        CheckpointError: no vocabulary, a damaged one, or one whose rules are unknown.
    """
    fields: dict[str, Any] = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    model, tokens = fields.get("model"), fields.get("tokens", [])
    if model not in ("gpt2", "llama"):
        raise _unusable(file, "unknown kind of tokenizer", "gpt2 or llama", model)
    if not _strings(tokens) or len(set(tokens)) < len(tokens):
        raise _unusable(file, "damaged vocabulary", "a list of different tokens", tokens)
    types = fields.get("token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise _unusable(file, "damaged vocabulary", f"{len(tokens)} token types", types)
    pre = SAME.get(str(fields.get("pre")), str(fields.get("pre")))
    spelled = _byte_level(file, fields, pre) if model == "gpt2" else _sentencepiece(file, fields, types)
    special = {name: _token(file, fields, key) for key, name in SPECIAL.items() if f"{key}_token_id" in fields}
    drops = bool(PHI3.search(str(file.metadata.get("general.name"))))
    marked = [(i, t) for i, t in enumerate(types) if t in (UNKNOWN, CONTROL, USER_DEFINED)]
    first = fields.get("add_bos_token", model == "llama" or pre in BOS_FIRST)
    spelled |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i], t, drops and tokens[i] not in PHI3_KEEPS) for i, t in marked],
        "post_processor": _beginning(special.get("bos_token") if first else None, fields.get("bos_token_id")),
    }
    _check(file, json.dumps(spelled))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    (folder / "tokenizer.json").write_text(json.dumps(spelled, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    if template := file.metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(str(template), encoding="utf-8")


def _byte_level(file: GGUFFile, fields: dict[str, Any], pre: str) -> dict[str, Any]:
    if pre not in RULES:
        raise _unusable(file, "unknown pre-tokenizer", ", ".join(sorted({*RULES, *SAME})), pre)
    if not _strings(fields.get("merges")):
        raise _unusable(file, "damaged vocabulary", "merges", fields.get("merges"))
    steps, ignore_merges = RULES[pre]
    merges = [merge.split(" ") for merge in fields["merges"]]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(fields["tokens"], merges, ignore_merges=bool(ignore_merges)),
    }


def _sentencepiece(file: GGUFFile, fields: dict[str, Any], types: list[int]) -> dict[str, Any]:
    tokens, scores = fields["tokens"], fields.get("scores") or []
    if len(scores) != len(tokens) or not all(isinstance(score, float) for score in scores):
        raise _unusable(file, "damaged vocabulary", f"{len(tokens)} scores", scores)
    known = {token: score for token, score, t in zip(tokens, scores, types, strict=True) if t in (NORMAL, USER_DEFINED)}
    merges = [
        (-score, [token[:i], token[i:]])
        for token, score in known.items()
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]
    prefix = bool(fields.get("add_space_prefix", True))
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, blanks]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            tokens,
            [pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
            unk_token=_token(file, fields, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _bpe(tokens: list[str], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocabulary, "merges": merges, **options}


def _added(number: int, token: str, kind: int, rstrip: bool) -> dict[str, Any]:
    """Matched in the text as a whole, before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False) | {"rstrip": rstrip}
    return {"id": number, "content": token, **flags, "special": kind != USER_DEFINED}


def _beginning(bos: str | None, number: int | None) -> dict[str, Any]:
    """Makes every encoded text begin with `bos`, or with nothing."""
    texts = [{"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB")]
    marks = [{"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1)] if bos is not None else []
    return {
        "type": "TemplateProcessing",
        "single": [*marks[:1], texts[0]],
        "pair": [*marks[:1], texts[0], *marks[1:], texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}} if bos is not None else {},
    }


def _token(file: GGUFFile, fields: dict[str, Any], which: str) -> str:
    number, tokens = fields.get(f"{which}_token_id", 0), fields["tokens"]
    if type(number) is not int or not 0 <= number < len(tokens):
        raise _unusable(file, f"impossible {which}_token_id", f"less than {len(tokens)}", number)
    return str(tokens[number])


def _strings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _check(file: GGUFFile, spelled: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(spelled)
    except Exception as error:  # the library raises nothing more particular
        raise _unusable(file, "damaged vocabulary", "merges of tokens into tokens", error) from error


def _unusable(file: GGUFFile, what: str, wanted: str, found: Any) -> CheckpointError:
    hint = "start from the original checkpoint"
    return CheckpointError(f"{file.path}: {what}", wanted=wanted, found=f"{found!r:.60}", hint=hint)
