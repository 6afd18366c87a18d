"""Models that GGUF holds otherwise than their class and its files do, where it is all that is exported."""

from __future__ import annotations

import pytest

from benchmarks import tiny
from benchmarks.tiny import save_tiny
from qtool.api import export, quantize
from qtool.artifact.compressed_tensors import CompressedTensors
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


RULES = [{"match": "re:.*(linear_attn|mamba|feed_forward).*_(proj|qkv|z)", "weights": "q4_0", "method": "gptq"}]
CHANGED = {
    "qwen3_5_text": ({"linear_num_value_heads": 6, "head_dim": 64}, "heads of values by turns"),
    "falcon_h1": ({"ssm_out_multiplier": 0.3, "mlp_multipliers": [0.7, 1.3]}, "multipliers as part of weights"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGED)
def test_tensors_are_changed_before_they_are_rounded(kind, tmp_path, monkeypatch):
    fields, what = CHANGED[kind]
    monkeypatch.setitem(tiny.PARTICULAR, kind, {**fields, "num_hidden_layers": 1 if kind == "falcon_h1" else 4})
    save_tiny(kind, folder := tmp_path / "model")
    make_tokenizer().save_pretrained(folder)
    asked = {**recipe({"to": "gguf"}), "layers": [*RULES, {"match": "*", "keep": True}]}
    report = quantize(str(folder), asked, tmp_path / "out", device="cpu", dtype="fp32")
    assert report.artifacts[0].verified and report.artifacts[0].proof.words.startswith("runs in llama.cpp")
    found, source = GGUF().open(tmp_path / "out"), HFCheckpoint(folder)
    part, wanted = {
        "qwen3_5_text": ("linear_attn", lambda w: w.view(len(w), 2, 3, -1).transpose(1, 2).flatten(1)),
        "falcon_h1": ("mamba", lambda w: 0.3 * w),
    }[kind]
    name = f"model.layers.0.{part}.out_proj"
    assert isinstance(found.layers[name].format, Q4_0)
    assert 0.02 < apart(found, name, wanted(source.tensor(f"{name}.weight"))) < 0.2
    with pytest.raises(QtoolError, match=rf"{kind} models are only changed as llama.cpp wants them \({what}\) if GGUF"):
        quantize(str(folder), {**asked, "export": [{"to": "gguf"}, {"to": "qtool"}]}, tmp_path / "both")
    if kind == "falcon_h1":
        return
    with pytest.raises(QtoolError, match="its runtimes know another order of heads in qwen3_5_text models than GGUF"):
        export(tmp_path / "out", "compressed-tensors", tmp_path / "again")
    asked["layers"] = [{"match": "re:.*linear_attn.out_proj", "weights": "int8-channel"}, {"match": "*", "keep": True}]
    again = {**asked, "export": [{"to": "compressed-tensors"}]}
    quantize(str(tmp_path / "out"), again, tmp_path / "again", device="cpu", dtype="fp32")
    back = CompressedTensors().open(tmp_path / "again")
    assert 0.02 < apart(back, name, source.tensor(f"{name}.weight")) < 0.2
