"""Two models side by side, against a plain loop over both."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from qtool.cli.app import app
from qtool.errors import UsageError
from qtool.models import open_model
from qtool.pipeline.diff import run
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize


def qtool(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="qtool")


@pytest.fixture(scope="module")
def pair(tiny_checkpoint, tmp_path_factory):
    """A model, and the same with some matrices in q4_0."""
    source, out = tiny_checkpoint("llama"), tmp_path_factory.mktemp("diff") / "out"
    recipe = out.with_name("q4.yaml")
    recipe.write_text(
        "recipe: 1\nname: q4\nexport: [{to: gguf}]\n"
        "layers: [{match: '*.up_proj', weights: q4_0}, {match: '*', keep: true}]\n"
    )
    quantize(QuantizeOptions(str(source), str(recipe), out))
    return source, next(out.glob("*.gguf"))


def test_every_tensor_against_a_plain_loop(pair):
    found = run(*map(str, pair))
    a, b = (open_model(str(path)) for path in pair)
    assert found.kinds == ("checkpoint", "gguf")
    assert found.only == ((), ())
    assert [t.name for t in found.tensors] == a.names()
    for tensor in found.tensors:
        x, y = a.tensor(tensor.name).double(), b.tensor(tensor.name).double()
        if torch.equal(x, y):
            assert tensor.error_db == math.inf
            assert "up_proj" not in tensor.name
        else:
            assert tensor.error_db == pytest.approx(
                float(10 * (x.square().sum() / (x - y).square().sum()).log10()), abs=1e-3
            )
            assert tensor.types == ("bf16", "q4_0")
            assert tensor.bits == (128 * 64 * 16, 128 * 64 * 9 // 2)
    assert sum(math.isfinite(t.error_db) for t in found.tensors) == 2


def test_what_the_command_says(pair):
    text = qtool("diff", *pair, "-q").stdout
    lines = text.splitlines()
    assert lines[0].startswith(f"A  {pair[0]}: checkpoint, ")
    assert "tensors are the same" in lines[2]
    (line,) = [line for line in lines if line.startswith("2 tensors")]
    assert line.split()[2:4] == ["bf16", "q4_0"]
    assert "up_proj" not in text
    assert "model.layers.1.mlp.up_proj.weight" in qtool("diff", *pair, "-q", "--tensors").stdout
    found = json.loads(qtool("diff", *pair, "-q", "--json").stdout)
    assert found["kinds"] == ["checkpoint", "gguf"]
    assert found["tensors"][0]["error_db"] == "Infinity"


def test_the_same_twice(pair):
    found = run(str(pair[1]), str(pair[1]))
    assert all(t.error_db == math.inf for t in found.tensors)
    assert found.metadata == {}
    assert qtool("diff", pair[1], pair[1], "-q").stdout.endswith(f"{len(found.tensors)} tensors are the same\n")


def test_another_model(pair, tiny_checkpoint):
    with pytest.raises(UsageError, match="has other shapes in the two models"):
        run(str(pair[0]), str(tiny_checkpoint("qwen3")))
    text = qtool("diff", pair[0], tiny_checkpoint("llama-tied"), "-q").stdout
    assert "only in A: lm_head.weight" in text
    assert "tie_word_embeddings: False | True" in text
