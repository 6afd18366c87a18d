"""`--split-max-size` on the commands that write GGUF."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from qtool.cli.app import app
from qtool.models import open_artifact

RECIPE = 'recipe: 1\nname: t\nlayers: [{match: "*", weights: q8_0}]\nexport: [{to: qtool}, {to: gguf}]\n'


def qtool(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def test_quantize_and_export_cut_models(tiny_checkpoint, recipe, tmp_path):
    out = tmp_path / "out"
    done = qtool("quantize", tiny_checkpoint("llama"), "-r", recipe, "-o", out, "--split-max-size", "0M")
    assert done.exit_code == 2 and "wanted a number of bytes" in done.stderr.replace("\n│ ", " ")
    done = qtool("quantize", tiny_checkpoint("llama"), "-r", recipe, "-o", out, "--split-max-size", "60000")
    assert done.exit_code == 0, done.stderr
    parts = sorted((out / "gguf").glob("*.gguf"))
    assert len(parts) > 2 and parts[0].name == f"llama0-t-00001-of-{len(parts):05}.gguf"
    done = qtool("export", out / "qtool", "--to", "gguf", "-o", tmp_path / "again", "--split-max-size", "60000")
    assert done.exit_code == 0, done.stderr
    again = sorted((tmp_path / "again").glob("*.gguf"))
    assert [p.stat().st_size for p in again] == [p.stat().st_size for p in parts]
    done = qtool("export", out / "gguf", "--to", "gguf", "-o", tmp_path / "whole")
    assert done.exit_code == 0, done.stderr
    (whole,) = (tmp_path / "whole").glob("*.gguf")
    found, wanted = open_artifact(out / "gguf"), open_artifact(whole)
    assert all((found.tensor(name) == wanted.tensor(name)).all() for name in wanted.names())


def test_only_gguf_has_parts(tiny_checkpoint, recipe, tmp_path):
    flag = ("-o", tmp_path / "out", "--split-max-size", "1G")
    refused = qtool("quantize", tiny_checkpoint("llama"), "-r", recipe, *flag, "--set", "export=[{to: qtool}]")
    assert refused.exit_code == 2
    assert "--split-max-size: wanted a recipe that exports gguf, found qtool" in refused.stderr
    refused = qtool("export", tmp_path, "--to", "qtool", *flag)
    assert refused.exit_code == 2 and "--split-max-size: wanted --to gguf, found --to qtool" in refused.stderr
