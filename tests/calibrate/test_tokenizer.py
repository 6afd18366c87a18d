"""Only the checkpoint's own tokenizer files are used, and no code that comes with them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

from qtool.calibrate import tokenizer as tokenizer_module
from qtool.calibrate.child import Child
from qtool.calibrate.tokenizer import batch_ids, load_tokenizer, token_ids
from qtool.calibrate.tokens import beginning
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, MissingExtra
from tests.tokenizers import TEXTS, byte_level, gemma_like, llama2_like, metaspace, phi3_like, unigram, wordpiece


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
    "tekken": (lambda: byte_level("tekken"), "PreTrainedTokenizerFast", {"padding_side": "left"}),
    "unigram": (unigram, "PreTrainedTokenizerFast", {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": None}),
    "wordpiece": (wordpiece, "PreTrainedTokenizerFast", {"cls_token": "[CLS]", "sep_token": "[SEP]"}),
    "metaspace": (metaspace, "PreTrainedTokenizerFast", {"bos_token": "<s>", "eos_token": "</s>"}),
    "extended": (lambda: byte_level("gpt-2"), "PreTrainedTokenizerFast", {"extra_special_tokens": ["<tag/>"]}),
}
"""tokenizer.json, and what tokenizer_config.json says."""


BEGIN = {"llama-2": 1, "phi-3": 1, "gemma": 2, "wordpiece": 2, "metaspace": 1}
"""What begins every text."""


def write(kind, folder, **changed):
    """The files of a kind, with some fields of tokenizer.json changed."""
    make, name, settings = KINDS[kind]
    spelled = json.loads(make().to_str())
    (folder / "tokenizer.json").write_text(json.dumps(spelled | changed))
    unknown = spelled["model"].get("unk_token") or ("<unk>" if "▁" in json.dumps(spelled, ensure_ascii=False) else None)
    config = {"tokenizer_class": name, "unk_token": unknown or "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))


TRUNCATION = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 2000},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 3,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_or_padded(kind, folder):
    write(kind, folder)
    plain = load_tokenizer(HFCheckpoint(folder))
    texts = ["a b", *TEXTS]
    wanted = [[token_ids(plain, text, special) for special in (False, True)] for text in texts]
    spelled = json.loads((folder / "tokenizer.json").read_text())
    padding = PADDING | {"pad_token": spelled["added_tokens"][0]["content"]}
    (folder / "tokenizer.json").write_text(json.dumps(spelled | {"truncation": TRUNCATION, "padding": padding}))
    changed = load_tokenizer(HFCheckpoint(folder))
    assert [[token_ids(changed, text, special) for special in (False, True)] for text in texts] == wanted
    assert batch_ids(changed, texts) == [bare for bare, _ in wanted]


def test_padding_that_would_take_all_memory(folder):
    """As it stands, native code aborts the process that tokenizes with it."""
    write("gpt-2", folder, padding=PADDING | {"strategy": {"Fixed": 2**40}})
    assert len(token_ids(load_tokenizer(HFCheckpoint(folder)), "Hello")) < 6


HARM = {
    "it aborts": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        r"the end of .+ \(SIGABRT\)",
    ),
    "it panics": (
        {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]], "byte_fallback": False}},
        "Unable to load vocab UnkIdNotInVocabulary",
    ),
    "it nests": (
        {"normalizer": functools.reduce(lambda n, _: {"type": "Sequence", "normalizers": [n]}, range(100), None)},
        "recursion limit exceeded",
    ),
}


@pytest.mark.parametrize(("changed", "found"), HARM.values(), ids=HARM)
def test_files_that_harm(changed, found, folder, capfd):
    write("gpt-2", folder, **changed)
    with pytest.raises(CheckpointError, match=rf"^the tokenizer of {folder} cannot be read: found {found}"):
        load_tokenizer(HFCheckpoint(folder))
    assert capfd.readouterr().err == ""


PANICS = {
    "a template names a token that is not there": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "an unknown word and no token for it": {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"a": 0},
        }
    },
}


@pytest.mark.parametrize("changed", PANICS.values(), ids=PANICS)
def test_texts_that_cannot_be_tokenized(changed, folder):
    write("gpt-2", folder, **changed)
    pattern = r"^the tokenizer (cannot read a text|of .+ cannot be read): found [^\n]+$"
    with pytest.raises(CheckpointError, match=pattern):
        token_ids(load_tokenizer(HFCheckpoint(folder)), "Hello", special=True)


def test_one_that_reads_no_text_at_all_does_its_worst_in_another_process(folder, capfd):
    piece = {"SpecialToken": {"id": "nope", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {}}
    write("gpt-2", folder, post_processor=template)
    with pytest.raises(CheckpointError, match=r"^the tokenizer of .* cannot be read: found no entry found for key$"):
        load_tokenizer(HFCheckpoint(folder))
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_never_ends(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(tokenizer_module, "SECONDS", 0.5)
    with pytest.raises(CheckpointError, match=r"cannot be read: wanted an end within 0\.5 seconds, found none$"):
        load_tokenizer(HFCheckpoint(folder))


def test_a_file_is_tried_once(folder, monkeypatch):
    started = []
    monkeypatch.setattr(tokenizer_module, "Child", lambda *given: started.append(given) or Child(*given))
    for _ in range(2):
        load_tokenizer(HFCheckpoint(folder))
    assert len(started) == 1
    write("gpt-2", folder)
    load_tokenizer(HFCheckpoint(folder))
    assert len(started) == 2


def test_files_that_are_none(folder, monkeypatch):
    for name, target in (("tokenizer.json", "/dev/zero"), ("config.json", "/dev/zero")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=rf"{name} is no regular file; give a copy of its content$"):
            load_tokenizer(HFCheckpoint(folder))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json is no regular file"):
        HFCheckpoint(folder)


def test_files_that_are_too_large(folder):
    for name, limit in (("tokenizer_config.json", 256), ("tokenizer.json", 256), ("config.json", 16)):
        os.truncate(folder / name, (limit << 20) + 1)
        pattern = rf"{name} is too large: wanted at most {limit} MiB, found {(limit << 20) + 1}"
        with pytest.raises(CheckpointError, match=pattern):
            load_tokenizer(HFCheckpoint(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_auto_tokenizer(kind, folder):
    from transformers import AutoTokenizer

    write(kind, folder)
    found, wanted = load_tokenizer(HFCheckpoint(folder)), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "<|user|>  a<|end|> \nb<start_of_turn>c</s>d"]:
        if kind == "llama-2" and text[:1] == " ":  # that class drops one, llama.cpp and the file do not
            continue
        assert token_ids(found, text) == wanted(text, add_special_tokens=False)["input_ids"], text
        assert token_ids(found, text, special=True) == wanted(text)["input_ids"], text
    assert beginning(found) == beginning(wanted) == BEGIN.get(kind)
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
    hint = "install it with: pip install 'protobuf>=5.26' 'sentencepiece>=0.2'"
    with pytest.raises(MissingExtra, match=f"^{message}; {hint}$"):
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
