"""The tokens of a model with their types, and scores where there are any: from tokenizer.json or tokenizer.model.

SentencePiece's BPE merges the pair whose joined piece has the highest score. tokenizer.json stores an order of merges
instead, so there a piece's score is minus the rank of the first merge that makes it: the same order.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.config import LIMIT
from qtool.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens; SentencePiece numbers them alike."""
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
BPE = 2


@dataclass
class Vocabulary:
    """Tokens by id.

    Attributes:
        texts: spelled as the model file spells them.
        types: of each.
        scores: of each; empty where merges are ordered by a list.
    """

    texts: list[str]
    types: list[int]
    scores: list[float]

    def resize(self, size: int) -> None:
        """Fills up with unused tokens; models pad the rows of their embedding.

        Raises:
            CheckpointError: there are more tokens than that.
        """
        missing = size - len(self.texts)
        if missing < 0:
            raise CheckpointError(
                "the tokenizer does not fit the model", wanted=f"{size} tokens", found=len(self.texts)
            )
        self.texts += [f"[PAD{i}]" for i in range(len(self.texts), size)]
        self.types += [UNUSED] * missing
        if self.scores:
            self.scores += [0.0] * missing


def from_json(tokenizer: dict[str, Any]) -> Vocabulary:
    """The tokens of a tokenizer.json with a BPE model; scored if it falls back to bytes.

    Raises:
        CheckpointError: an impossible id.
        TypeError, KeyError, AttributeError: it is spelled otherwise.
    """
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    scored = bool(model.get("byte_fallback"))
    ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    if not all(isinstance(text, str) for text in ids):
        raise TypeError("a token is no text")
    size = max(ids.values()) + 1
    if size > LIMIT or min(ids.values()) < 0:
        raise CheckpointError("tokenizer.json: impossible id of a token", wanted=f"0 to {LIMIT - 1}", found=size - 1)
    vocabulary = Vocabulary([f"[PAD{i}]" for i in range(size)], [UNUSED] * size, [0.0] * (size if scored else 0))
    for text, i in ids.items():
        vocabulary.texts[i] = text
        vocabulary.types[i] = BYTE if scored and BYTE_TOKEN.fullmatch(text) else NORMAL
    for token in added:
        vocabulary.types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if scored:
        if model.get("unk_token") in ids:
            vocabulary.types[ids[model["unk_token"]]] = UNKNOWN
        for rank, merge in reversed(list(enumerate(merges(model)))):
            vocabulary.scores[ids["".join(merge.split(" "))]] = -float(rank)
    return vocabulary


def merges(model: dict[str, Any]) -> list[str]:
    """The merges of a BPE model in order, "left right"; newer files store pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def from_sentencepiece(path: Path) -> tuple[Vocabulary, bool]:
    """Reads tokenizer.model, a protocol buffer.

    Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

    Returns:
        (the tokens; True if a space is put before the text).

    Raises:
        CheckpointError: damaged, or not BPE.
    """
    vocabulary, kind, prefix = Vocabulary([], [], []), 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece: dict[int, Any] = {2: bytes(4), 3: NORMAL} | dict(_fields(value))
                vocabulary.texts.append(piece[1].decode())
                vocabulary.scores.append(struct.unpack("<f", piece[2])[0])
                vocabulary.types.append(piece[3])
            elif number == 2:
                kind = dict(_fields(value)).get(3, kind)
            elif number == 3:
                prefix = bool(dict(_fields(value)).get(3, prefix))
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path} is no SentencePiece model") from error
    if kind != BPE or not vocabulary.texts:
        raise CheckpointError(f"{path}: GGUF's llama tokenizer is BPE", wanted=f"model type {BPE}", found=kind)
    return vocabulary, prefix


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, integer or bytes) of a protocol buffer message.

    Source: https://protobuf.dev/programming-guides/encoding
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if position + length > len(data):
            raise IndexError(length)
        yield number, data[position : position + length]
        position += length
