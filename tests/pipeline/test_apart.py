"""Layers that a class and its files keep in one are quantized apart where GGUF is all that is exported."""

from __future__ import annotations

import pytest

from benchmarks import tiny
from benchmarks.tiny import save_tiny
from qtool.api import export, quantize
from qtool.artifact.gguf import GGUF
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import QtoolError
from qtool.formats.q4_0 import Q4_0
from tests.conftest import make_tokenizer

EXPERTS = "model.layers.1.block_sparse_moe.input_linear"
pytestmark = pytest.mark.proven


def recipe(*exports):
    weights = {"weights": "q4_0", "method": "gptq"}
    layers = [{"match": "re:.*(expert|shared_mlp).*_(proj|linear)", **weights}, {"match": "*", "keep": True}]
    calibration = {"data": "builtin", "samples": 4, "length": 96}
    return {"recipe": 1, "name": "test", "calibration": calibration, "layers": layers, "export": [*exports]}


def test_they_are_measured_rounded_and_run_in_llama_cpp(tmp_path, monkeypatch):
    kind = "granitemoeshared"
    monkeypatch.setitem(tiny.PARTICULAR, kind, {"num_hidden_layers": 2, "num_local_experts": 2})
    save_tiny(kind, folder := tmp_path / "model")
    make_tokenizer().save_pretrained(folder)
    report = quantize(str(folder), recipe({"to": "gguf"}), tmp_path / "out", device="cpu", dtype="fp32")
    assert report.artifacts[0].verified and report.artifacts[0].proof.words.startswith("runs in llama.cpp")
    found, source = GGUF().open(tmp_path / "out"), HFCheckpoint(folder)
    wholes = {
        "model.layers.1.block_sparse_moe.experts.1.": source.tensor(f"{EXPERTS}.weight")[1],
        "model.layers.0.shared_mlp.": source.tensor("model.layers.0.shared_mlp.input_linear.weight"),
    }
    methods = {entry.name: entry.method for entry in report.layers}
    for place, whole in wholes.items():
        for name, half in zip(("gate_proj", "up_proj"), whole.chunk(2), strict=True):
            assert methods[place + name] == "gptq" and isinstance(found.layers[place + name].format, Q4_0)
            assert 0.02 < apart(found, place + name, half) < 0.2
    with pytest.raises(QtoolError, match=rf"layers that {kind} models keep in one are only told apart if GGUF is all"):
        quantize(str(folder), recipe({"to": "gguf"}, {"to": "qtool"}), tmp_path / "both")
    with pytest.raises(QtoolError, match="as one tensor only; gguf holds them"):
        export(tmp_path / "out", "compressed-tensors", tmp_path / "again")


def apart(model, name, wanted):
    """How far a matrix is from another, relative to that."""
    return float((model.tensor(f"{name}.weight") - wanted).norm() / wanted.norm())
