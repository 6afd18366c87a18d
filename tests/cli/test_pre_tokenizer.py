"""A tokenizer whose splitting rules GGUF has no name for: refused before any work, unless the user names them."""

from __future__ import annotations

import json
import shutil

import pytest

from qtool.checkpoint.gguf_io import GGUFFile
from tests.cli.test_commands import qtool

RECIPE = """\
recipe: 1
name: tiny
layers: [{match: lm_head, keep: true}, {match: "*", weights: q8_0}]
export: [{to: qtool}, {to: gguf}]
"""


@pytest.fixture
def model(tiny_checkpoint, tmp_path):
    """A tiny model that splits text in a way of its own."""
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    spelled = json.loads((folder / "tokenizer.json").read_text())
    spelled["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(spelled))
    return folder


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "tiny.yaml"


def pre_tokenizer(folder):
    (path,) = folder.rglob("*.gguf")
    return GGUFFile(path).metadata["tokenizer.ggml.pre"]


def test_refused_in_the_plan_and_named_by_an_option(model, recipe, tmp_path):
    refused = qtool("quantize", model, "-r", recipe, "-o", tmp_path / "out")
    assert refused.exit_code == 4
    assert "gguf cannot hold this model: " in refused.stderr
    assert "this tokenizer.json's is not recognized: wanted gpt-2, " in refused.stderr
    assert "name it: --pre-tokenizer NAME" in refused.stderr
    assert not list(tmp_path.glob("out*"))
    named = qtool("quantize", model, "-r", recipe, "-o", tmp_path / "out", "--pre-tokenizer", "gpt-2")
    assert named.exit_code == 0, named.stderr
    assert pre_tokenizer(tmp_path / "out") == "gpt-2"


def test_export_refuses_and_takes_the_name_as_well(model, recipe, tmp_path):
    only = ("--set", "export=[{to: qtool}]")
    assert qtool("quantize", model, "-r", recipe, "-o", tmp_path / "out", *only).exit_code == 0
    source = tmp_path / "out"  # a single artifact lies there itself
    refused = qtool("export", source, "--to", "gguf", "-o", tmp_path / "gguf")
    assert refused.exit_code == 4 and "--pre-tokenizer NAME" in refused.stderr
    assert not (tmp_path / "gguf").exists()
    named = qtool("export", source, "--to", "gguf", "-o", tmp_path / "gguf", "--pre-tokenizer", "gpt-2")
    assert named.exit_code == 0, named.stderr
    assert pre_tokenizer(tmp_path / "gguf") == "gpt-2"


def test_names_that_llama_cpp_does_not_know_are_refused(model, recipe, tmp_path):
    refused = qtool("quantize", model, "-r", recipe, "-o", tmp_path / "out", "--pre-tokenizer", "qwen3")
    assert refused.exit_code == 4
    assert "llama.cpp knows no pre-tokenizer called 'qwen3'" in refused.stderr
    assert "did you mean 'qwen" in refused.stderr
    assert not list(tmp_path.glob("out*"))


def test_only_gguf_has_such_names(model, recipe, tmp_path):
    arguments = ("quantize", model, "-r", recipe, "-o", tmp_path / "out", "--pre-tokenizer", "gpt-2")
    refused = qtool(*arguments, "--set", "export=[{to: qtool}]")
    assert refused.exit_code == 2
    assert "--pre-tokenizer: wanted a recipe that exports gguf, found qtool" in refused.stderr
    refused = qtool("export", tmp_path, "--to", "qtool", "-o", tmp_path / "x", "--pre-tokenizer", "gpt-2")
    assert refused.exit_code == 2
    assert "--pre-tokenizer: wanted --to gguf, found --to qtool" in refused.stderr
