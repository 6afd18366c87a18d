"""Only the checkpoint's own tokenizer files are used, and no code that comes with them."""

from __future__ import annotations

import json
import shutil

import pytest

from qtool.calibrate.tokenizer import load_tokenizer
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to change."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


def test_the_tokenizer_beside_the_weights(folder):
    tokenizer = load_tokenizer(HFCheckpoint(folder))
    text = "Expressions are evaluated from left to right. Ünïcödé"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]


def test_none(folder):
    (folder / "tokenizer.json").unlink()
    wanted = "one of tokenizer.json, tokenizer.model, vocab.json"
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(HFCheckpoint(folder))
    assert str(caught.value) == f"{folder} has no tokenizer: wanted {wanted}"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 7}}', "\0"], ids=repr)
def test_damaged_files(content, folder):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^the tokenizer of {folder} cannot be read: found [^\n]+$"):
        load_tokenizer(HFCheckpoint(folder))


def test_code_beside_it_is_not_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as a hasty user would answer
    trap = folder / "ran"
    (folder / "tokenization.py").write_text(f"open({str(trap)!r}, 'w')\nclass Trap: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["tokenization.Trap", "tokenization.Trap"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="contains custom code"):
        load_tokenizer(HFCheckpoint(folder))
    assert not trap.exists()
