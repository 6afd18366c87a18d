"""Only the checkpoint's own tokenizer files are used, and no code that comes with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

from qtool.calibrate.tokenizer import load_tokenizer, token_ids
from qtool.calibrate.tokens import beginning
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, MissingExtra
from tests.tokenizers import TEXTS, byte_level, gemma_like, llama2_like, phi3_like


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to change."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


def test_the_tokenizer_beside_the_weights(folder):
    tokenizer = load_tokenizer(HFCheckpoint(folder))
    text = "Expressions are evaluated from left to right. Ünïcödé"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]


KINDS = {
    "gpt-2": (lambda: byte_level("gpt-2"), "PreTrainedTokenizerFast", {"eos_token": "<|im_end|>"}),
    "llama-3": (lambda: byte_level("llama-bpe"), "PreTrainedTokenizerFast", {"bos_token": "<|im_start|>"}),
    "qwen-2": (lambda: byte_level("qwen2"), "Qwen2Tokenizer", {"eos_token": "<|im_end|>", "add_bos_token": False}),
    "llama-2": (llama2_like, "LlamaTokenizer", {"bos_token": "<s>", "eos_token": "</s>", "legacy": True}),
    "phi-3": (phi3_like, "PreTrainedTokenizerFast", {"bos_token": "<s>", "eos_token": "<|endoftext|>"}),
    "gemma": (gemma_like, "GemmaTokenizer", {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}),
    "extended": (lambda: byte_level("gpt-2"), "PreTrainedTokenizerFast", {"extra_special_tokens": ["<tag/>"]}),
}
"""tokenizer.json, and what tokenizer_config.json says."""


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_auto_tokenizer(kind, folder):
    from transformers import AutoTokenizer

    make, name, settings = KINDS[kind]
    make().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": name, "unk_token": "<unk>" if "▁" in make().to_str() else "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    found, wanted = load_tokenizer(HFCheckpoint(folder)), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "<|user|>  a<|end|> \nb<start_of_turn>c</s>d"]:
        if kind == "llama-2" and text[:1] == " ":  # that class drops one, llama.cpp and the file do not
            continue
        assert token_ids(found, text) == wanted(text, add_special_tokens=False)["input_ids"], text
        assert token_ids(found, text, special=True) == wanted(text)["input_ids"], text
    assert beginning(found) == beginning(wanted) == {"llama-2": 1, "phi-3": 1, "gemma": 2}.get(kind)
    assert len(found) == len(wanted)
    assert (found.bos_token, found.eos_token) == (wanted.bos_token, wanted.eos_token)


def test_quick(folder):
    """The search for a tokenizer class takes a second of imports that a tokenizer.json does not need."""
    program = (
        "import sys; from pathlib import Path; from qtool.checkpoint.hf import HFCheckpoint;"
        "from qtool.calibrate.tokenizer import load_tokenizer, token_ids;"
        f"print(token_ids(load_tokenizer(HFCheckpoint(Path({str(folder)!r}))), '<|im_end|>'));"
        "print([m for m in sys.modules if m in ('transformers.models.auto', 'transformers.modeling_utils')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[2]", "[]"]


def test_none(folder):
    (folder / "tokenizer.json").unlink()
    wanted = "one of tokenizer.json, tokenizer.model, vocab.json"
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(HFCheckpoint(folder))
    assert str(caught.value) == f"{folder} has no tokenizer: wanted {wanted}"


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_sentencepiece_alone_needs_its_packages(missing, folder, monkeypatch):
    """One line, instead of transformers' search for other readers."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    for module in ("sentencepiece", "google", "google.protobuf"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, missing, None)
    package = missing.removeprefix("google.")
    message = f"a model whose only tokenizer is tokenizer.model needs the package {package}"
    with pytest.raises(MissingExtra, match=rf"^{message}; install it with: pip install 'qtool\[sentencepiece\]'$"):
        load_tokenizer(HFCheckpoint(folder))


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
