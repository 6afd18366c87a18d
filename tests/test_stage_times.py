"""The benchmark of whole runs compares what was run side by side, and compiles on a model of one block."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import stages
from benchmarks.measure import Cost
from qtool.recipe.load import load_recipe
from qtool.report.model import StageEntry


def report(seconds, solving):
    layers = [SimpleNamespace(seconds=s, output_error_db=db) for s, db in zip(solving, (20.0, None, 30.0), strict=True)]
    entries = [StageEntry(name=n, seconds=s, peak_bytes=1) for n, s in (("plan", 1.0), ("quantize", seconds))]
    return SimpleNamespace(layers=layers, stages=entries)


@pytest.fixture
def runs(monkeypatch):
    """Stands in for processes; gives the commands."""
    seen = []
    reports = {"int4-g64": report(8.0, (1.0, 2.0, 0.5)), "q4_k": report(10.0, (4.0, 1.0, 1.0))}

    def measure(command, log):
        seen.append([str(word) for word in command])
        return Cost(40.0 if "peer_gptq" in seen[-1][1] else 12.0, 3 << 30)

    monkeypatch.setattr(stages, "measure", measure)
    monkeypatch.setattr(stages, "read_report", lambda path: reports[path.parent.name.removeprefix("stages-")])
    monkeypatch.setattr(stages.models, "write_tokens", lambda *given: given[2])
    monkeypatch.setattr(stages, "first_block", lambda source, out: out)
    return seen


def test_ratios_are_those_of_one_run(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "KEPT", tmp_path / "stages.json")
    found = list(stages.lines(["qtool"], tmp_path / "wide", tmp_path, "text", tmp_path / "python", ["q4_k"]))
    assert [tuple(line) for line in found] == [
        ("llm-compressor", 40.0, 0.0, 0.0, 3 << 30, 0.0, 0.0, 1.0),
        ("int4-g64", 12.0, 8.0, 3.5, 3 << 30, 25.0, 1.0, 0.3),
        ("q4_k", 12.0, 10.0, 6.0, 3 << 30, 25.0, 1.25, 0.3),
    ]
    models = [command[command.index("quantize") + 1].rpartition("/")[2] for command in runs[1:]]
    assert models == ["first-block", "wide"] * 2
    assert list(stages.rows()) == []
    stages.keep(found)
    assert list(stages.rows())[2] == ("q4_k", "12.0", "10.0", "6.0", "3.00", "25.00", "1.25", "0.30")


@pytest.mark.parametrize("label", stages.FORMATS)
def test_recipes_are_valid_and_integers_are_plain(label, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "read_report", lambda path: None)
    stages.run(["qtool"], tmp_path, tmp_path, label, 'a: "b" # c.txt')
    recipe = load_recipe(str(tmp_path / f"stages-{label}.yaml"))
    (rule,) = recipe.layers[1:]
    assert (recipe.calibration.data, rule.method.rounds) == ('a: "b" # c.txt', int(label != "int4-g64"))


def test_the_first_block_is_left(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text('{"num_hidden_layers": 12, "hidden_size": 2}')
    tensors = {f"model.layers.{i}.w": torch.full((2,), float(i)) for i in (0, 1, 10)} | {"model.norm.w": torch.ones(2)}
    save_file(tensors, source / "model.safetensors")
    out = stages.first_block(source, tmp_path / "short")
    assert load_file(out / "model.safetensors").keys() == {"model.layers.0.w", "model.norm.w"}
    assert json.loads((out / "config.json").read_text()) == {"num_hidden_layers": 1, "hidden_size": 2}
