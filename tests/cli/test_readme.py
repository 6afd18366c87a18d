"""The first line of the README, as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qtool.cli.app import app
from qtool.cli.options import default_out
from qtool.formats.int import Int
from qtool.models import open_artifact
from tests.artifact.conftest import save_llama

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LINE = "qtool quantize llama-7b --recipe w4a8.yaml"


def first_line():
    """The first command that the README shows."""
    return re.search(r"^    (qtool .+)$", README, re.MULTILINE)[1]


def qtool(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="qtool")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a small `llama-7b`, whose rows of 192 columns 128 does not divide."""
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "llama-7b", 192, torch.bfloat16)
    return tmp_path


def test_the_readme_begins_with_it():
    assert first_line() == LINE


@pytest.mark.slow
def test_the_line_works_as_written(here):
    result = qtool(*shlex.split(first_line())[1:])
    assert result.exit_code == 0, result.stderr
    assert "there is no file w4a8.yaml: using the recipe w4a8 that ships with qtool" in result.stderr
    report = json.loads((here / "llama-7b-w4a8" / "report.json").read_text())
    assert report["recipe"]["name"] == "w4a8"
    layers = open_artifact(here / "llama-7b-w4a8").layers
    groups = {name.rpartition(".")[2]: layer.format.group for name, layer in layers.items()}
    assert groups == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 64) | {
        "down_proj": 128
    }
    assert {(layer.format.bits, type(layer.activations), layer.activations.bits) for layer in layers.values()} == {
        (4, Int, 8)
    }


def test_a_file_of_that_name_comes_first(here):
    (here / "w4a8.yaml").write_text(
        'recipe: 1\nname: mine\nlayers: [{match: "*", weights: q8_0}]\nexport: [{to: gguf}]\n'
    )
    result = qtool("plan", "llama-7b", "--recipe", "w4a8.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "q8_0" in result.stdout


def test_other_spellings(here):
    for recipe, told in (("w4a8", False), ("w4a8.yml", True), ("w4a8.yaml", True)):
        result = qtool("plan", "llama-7b", "--recipe", recipe)
        assert result.exit_code == 0, result.stderr
        assert (f"there is no file {recipe}: using the recipe w4a8" in result.stderr) is told
    result = qtool("plan", "llama-7b", "--recipe", "w4a9.yaml")
    assert result.exit_code == 3
    assert "no file and no shipped recipe is called 'w4a9.yaml'; did you mean 'w4a8'" in result.stderr


@pytest.mark.parametrize(
    ("model", "recipe", "out"),
    [
        ("owner/Llama-3@main", "w4a8", "Llama-3-w4a8"),
        ("folder/", "recipes/mine.yaml", "folder-mine"),
        ("a/model.Q4_0.gguf", "w4a8.yaml", "model.Q4_0-w4a8"),
        (".", "w4a8", "here-w4a8"),
    ],
)
def test_where_the_result_goes_if_nobody_says(model, recipe, out, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_out(model, recipe) == Path(out)


KEEP = 'recipe: 1\nname: mine\nlayers: [{match: "*", keep: true}]\nexport: [{to: gguf}]\n'


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_recipe_that_quantizes_nothing_says_so(command, here):
    (here / "keep.yaml").write_text(KEEP)
    warning = "none of 16 matrices is quantized: the rules of mine keep all of them"
    result = qtool(command, "llama-7b", "--recipe", "keep.yaml")
    assert result.exit_code == 0, result.stderr
    assert f"warning: {warning}" in result.stderr
    shutil.rmtree(here / "llama-7b-keep", ignore_errors=True)
    result = qtool(command, "llama-7b", "--recipe", "keep.yaml", "--strict")
    assert result.exit_code == 12
    assert f"error: {warning}; without --strict this is a warning" in result.stderr
    assert not (here / "llama-7b-keep").exists()


def test_a_smoke_run_says_what_it_leaves_out(here):
    result = qtool("plan", "llama-7b", "--recipe", "w4a8kv4", "--limit-layers", 1)
    assert "the rest is untouched, and the KV cache is not quantized" in result.stderr
    assert "KV cache" not in qtool("plan", "llama-7b", "--recipe", "w4a8", "--limit-layers", 1).stderr


def test_advice_fits_the_command(here):
    result = qtool("export", "llama-7b", "--to", "gguf", "-o", "out")
    assert result.exit_code == 5
    assert "quantize it; a recipe whose rules say keep: bf16 writes unquantized weights" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "llama-7b", "-r", "gguf-q4_0"),
        ("quantize", "llama-7b", "-r", "gguf-q4_0"),
        ("quantize", "llama-7b", "-r", "w4a8"),
        ("calibrate", "llama-7b", "-r", "w4a8", "-o", "stats"),
        ("eval", "llama-7b", "--text", "text.txt"),
    ],
    ids=" ".join,
)
def test_a_missing_tokenizer_has_one_exit_code(arguments, here):
    (here / "llama-7b" / "tokenizer.json").unlink()
    (here / "text.txt").write_text("Some words.")
    result = qtool(*arguments)
    assert result.exit_code == 5
    assert "error: llama-7b has no tokenizer: wanted " in result.stderr
