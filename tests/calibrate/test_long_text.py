"""Ids of long texts are those of the whole text, though it is never tokenized whole."""

from __future__ import annotations

import shutil

import pytest

from qtool.calibrate import long_text
from qtool.calibrate.long_text import file_ids
from qtool.calibrate.tokenizer import load_tokenizer, token_ids
from qtool.checkpoint.hf import HFCheckpoint
from tests.calibrate.test_tokenizer import KINDS, write
from tests.tokenizers import PROSE, TEXTS


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to change."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 500)
    monkeypatch.setattr(long_text, "OVERLAP", 100)


@pytest.fixture
def seen(monkeypatch):
    """Characters that each call tokenizes."""
    lengths = []
    placed = long_text._placed
    monkeypatch.setattr(long_text, "_placed", lambda t, text: lengths.append(len(text)) or placed(t, text))
    return lengths


MIXED = (
    "".join(TEXTS).replace("\r", "")
    + PROSE[9][:3000]
    + "naïve café 你好世界 🙂🙃👩\u200d👩\u200d👧 " * 30
    + PROSE[10][:2000]
)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_joined_without_a_seam(kind, folder, seen):
    write(kind, folder)
    (folder / "a.txt").write_text(MIXED, encoding="utf-8")
    tokenizer = load_tokenizer(HFCheckpoint(folder))
    found, blank = file_ids(folder / "a.txt", tokenizer)
    assert list(found) == token_ids(tokenizer, MIXED, special=True)
    assert not blank
    assert len(seen) >= len(MIXED) // 500
    assert max(seen) < 2000


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2", "unigram"])
def test_windows_grow_where_tokens_depend_on_what_is_far(kind, folder, seen):
    text = PROSE[9][:600] + "-=" * 700 + "a" * 1501 + " " * 1200 + PROSE[10][:2000]
    write(kind, folder)
    (folder / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(HFCheckpoint(folder))
    assert list(file_ids(folder / "a.txt", tokenizer)[0]) == token_ids(tokenizer, text, special=True)


def test_a_text_is_read_as_far_as_it_is_needed(folder, seen):
    write("llama-2", folder)
    (folder / "a.txt").write_bytes(MIXED.encode() * 20 + b"\xff" * 1000)
    tokenizer = load_tokenizer(HFCheckpoint(folder))
    found, _ = file_ids(folder / "a.txt", tokenizer, most=1000)
    assert 1000 <= len(found) < 2000
    assert list(found) == token_ids(tokenizer, MIXED * 3, special=True)[: len(found)]
    assert sum(seen) < 10_000
    with pytest.raises(UnicodeDecodeError):
        file_ids(folder / "a.txt", tokenizer)


@pytest.mark.parametrize(("text", "blank"), [(" \n\t" * 400, True), ("", True), (" " * 900 + "a", False), ("a", False)])
def test_white_space_is_noticed(text, blank, folder):
    (folder / "a.txt").write_text(text)
    assert file_ids(folder / "a.txt", load_tokenizer(HFCheckpoint(folder)))[1] is blank


class Slow:
    """A tokenizer that says nothing about places: two letters are a token."""

    def __init__(self):
        self.read = 0

    def __call__(self, text, add_special_tokens, **settings):
        assert settings == {"truncation": False, "padding": False, "verbose": False}
        self.read = max(self.read, len(text))
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text[::2]]}


def test_tokenizers_of_other_kinds_read_no_further_either(tmp_path):
    (tmp_path / "a.txt").write_text(MIXED * 5, encoding="utf-8")
    slow = Slow()
    found, _ = file_ids(tmp_path / "a.txt", slow, most=300)
    assert found[:300] == [0, *(ord(c) for c in MIXED[::2])][:300]
    assert slow.read <= 1500
    assert file_ids(tmp_path / "a.txt", slow)[0] == [0, *(ord(c) for c in (MIXED * 5)[::2])]
