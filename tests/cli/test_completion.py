"""What shells complete: recipes that ship and families of them, layouts, types of tensors."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from qtool import registry
from qtool.cli.app import app
from qtool.recipe.load import list_recipes


def completed(line):
    words = line.split(" ")
    environment = {"_QTOOL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return CliRunner().invoke(app, [], prog_name="qtool", env=environment).stdout.split()


@pytest.mark.parametrize("command", ["plan", "quantize", "calibrate"])
def test_recipes(command):
    wanted = sorted(entry.name for entry in list_recipes() if entry.name.startswith("gguf-q4"))
    assert "gguf-q4_k_m" in wanted
    assert completed(f"qtool {command} MODEL --recipe gguf-q4") == wanted


def test_families():
    assert completed("qtool quantize MODEL --family gg") == ["gguf", "gguf-fit"]


def test_layouts_and_types():
    assert completed("qtool export OUT --to g") == ["gguf", "gptq"]
    assert sorted(completed("qtool export OUT --to ")) == registry.names("artifact")
    assert completed("qtool quantize MODEL --tensor-type attn_v=q6") == ["attn_v=q6_k"]
    assert completed("qtool quantize MODEL --tensor-type attn_v") == []
