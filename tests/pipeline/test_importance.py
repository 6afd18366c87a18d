"""From calibration to an importance matrix of llama.cpp, and from one to codes."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from qtool.calibrate.tokens import load_tokens
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import CheckpointError, PlanError, UsageError
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.importance import read_importance, write_importance
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Calibration
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.store.imatrix import ImportanceEntry, ImportanceMatrix, read_imatrix, write_imatrix

RECIPE = """
recipe: 1
name: t
method: {method}
calibration: {{samples: 3, length: 48, propagate: float}}
layers:
  - {{match: "*.o_proj", weights: q4_1}}
  - {{match: "*", weights: q4_0}}
export: [{{to: gguf}}]
"""
READERS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
READERS |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
READERS |= {"ffn_down": "mlp.down_proj"}


@pytest.fixture
def recipe(tmp_path):
    def recipe(method):
        (tmp_path / f"{len(method)}.yaml").write_text(RECIPE.format(method=method))
        return str(tmp_path / f"{len(method)}.yaml")

    return recipe


@pytest.fixture
def measured(recipe, tiny_checkpoint, tmp_path):
    """(model, recipe, importance matrix) of the plainest model."""
    model, path = str(tiny_checkpoint("llama")), recipe("{rtn: {importance: true}}")
    calibrate(CalibrateOptions(model, path, tmp_path / "m.gguf", dtype="fp32"))
    return model, path, tmp_path / "m.gguf"


def written(folder):
    """The bytes of all tensors; the header names the importance matrix."""
    (file,) = folder.glob("*.gguf")
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


def legacy(path):
    """The layout before GGUF, without a word on where it comes from."""
    entries = read_imatrix(path).entries
    data = np.int32(len(entries)).tobytes()
    for name, entry in entries.items():
        values = (entry.sums / entry.counts).numpy().astype(np.float32) * np.float32(8)
        data += np.int32(len(name)).tobytes() + name.encode() + np.int32([8, values.size]).tobytes() + values.tobytes()
    return data


def test_sums_are_those_of_plain_forward_passes(measured):
    from transformers import AutoModelForCausalLM

    source, recipe, path = measured
    tokens = load_tokens(load_recipe(recipe).calibration, open_checkpoint(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    names = {f"blk.{i}.{there}": f"model.layers.{i}.{here}" for i in (0, 1) for there, here in READERS.items()}
    names["output"] = "lm_head"
    wanted = dict.fromkeys(names, 0.0)

    def count(there):
        def hook(_, inputs):
            wanted[there] = wanted[there] + inputs[0].double().square().flatten(0, -2).sum(0)

        return hook

    for there, here in names.items():
        model.get_submodule(here).register_forward_pre_hook(count(there))
    for sample in tokens:
        model(sample[None])
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert found.keys() == {f"{name}.weight.{part}" for name in names for part in ("in_sum2", "counts")}
    for name in names:
        np.testing.assert_allclose(found[f"{name}.weight.in_sum2"], wanted[name].detach().numpy(), rtol=1e-4)
        assert found[f"{name}.weight.counts"].tolist() == [3 * 48]
    told = [reader.fields[f"imatrix.{key}"].contents() for key in ("datasets", "chunk_count", "chunk_size")]
    assert told == [["builtin"], 3, 48]


def test_codes_are_those_of_a_float_walk(measured, recipe, tmp_path):
    source, path, matrix = measured
    walked = quantize(QuantizeOptions(source, path, tmp_path / "walked", dtype="fp32"))
    for name, how in {"gptq": recipe("gptq"), "none": recipe("rtn")}.items():
        report = quantize(QuantizeOptions(source, how, tmp_path / name, imatrix=matrix))
        assert written(tmp_path / name) == written(tmp_path / "walked")
        assert [e.tokens for e in report.layers] == [e.tokens for e in walked.layers]
        assert {e.method for e in report.layers if e.format} == {"rtn"}
        told = {"data": "m.gguf", "datasets": ["builtin"], "entries": 15, "samples": 3, "length": 48}
        assert report.calibration == told
    quantize(QuantizeOptions(source, recipe("rtn"), tmp_path / "plain"))
    assert written(tmp_path / "plain") != written(tmp_path / "walked")


def test_legacy_files_give_the_same_codes(measured, tmp_path):
    source, path, matrix = measured
    (tmp_path / "m.dat").write_bytes(legacy(matrix))
    for name in ("m.gguf", "m.dat"):
        quantize(QuantizeOptions(source, path, tmp_path / name[2:], imatrix=tmp_path / name))
    assert written(tmp_path / "dat") == written(tmp_path / "gguf")


def test_the_file_names_its_importance_matrix_as_llama_quantize_does(measured, recipe, tmp_path):
    """Keys and types of `llama_model_quantize_impl`; strings, and numbers as u32."""
    source, path, matrix = measured
    (tmp_path / "anonymous.dat").write_bytes(legacy(matrix))
    quantize(QuantizeOptions(source, path, tmp_path / "named", imatrix=matrix))
    quantize(QuantizeOptions(source, path, tmp_path / "nameless", imatrix=tmp_path / "anonymous.dat"))
    quantize(QuantizeOptions(source, recipe("rtn"), tmp_path / "without"))

    def told(folder):
        (file,) = (tmp_path / folder).glob("*.gguf")
        fields = gguf.GGUFReader(file).fields
        found = {k.removeprefix("quantize.imatrix."): f for k, f in fields.items() if k.startswith("quantize.")}
        return {key: (field.types[0].name, field.contents()) for key, field in found.items()}

    numbers = {"entries_count": ("UINT32", 15)}
    assert told("named") == {
        "file": ("STRING", "m.gguf"),
        "dataset": ("STRING", "builtin"),
        "chunks_count": ("UINT32", 3),
        **numbers,
    }
    assert told("nameless") == {"file": ("STRING", "anonymous.dat"), **numbers}
    assert told("without") == {}


def test_what_a_file_does_not_mention_is_rounded_without_it_and_told(measured, recipe, tmp_path):
    source, path, matrix = measured
    kept = {
        n: e for n, e in read_imatrix(matrix).entries.items() if not n.startswith(("blk.1.ffn_down", "blk.0.attn_q"))
    }
    write_imatrix(tmp_path / "less.gguf", ImportanceMatrix(kept, ("x",), 3, 48))
    events = []
    report = quantize(QuantizeOptions(source, path, tmp_path / "less", imatrix=tmp_path / "less.gguf"), events.append)
    warnings = [e.message for e in events if e.warning]
    assert warnings == [
        f"{tmp_path / 'less.gguf'} says nothing about the inputs of model.layers.1.mlp.down_proj: "
        "their codes are chosen without data"
    ]
    fallbacks = {e.name: e.fallback for e in report.layers if e.fallback}
    text = "chosen without data: nothing was measured on its inputs"
    assert fallbacks == {"model.layers.1.mlp.down_proj": text}  # q reads what k and v read
    quantize(QuantizeOptions(source, recipe("rtn"), tmp_path / "plain"))
    quantize(QuantizeOptions(source, path, tmp_path / "whole", imatrix=matrix))

    def down(name):
        (file,) = (tmp_path / name).glob("*.gguf")
        tensors = {t.name: t.data for t in gguf.GGUFReader(file).tensors}
        return tensors["blk.1.ffn_down.weight"].tobytes(), tensors["blk.0.attn_q.weight"].tobytes()

    assert down("less") == (down("plain")[0], down("whole")[1])
    assert down("plain")[0] != down("whole")[0]


def test_experts_are_rows_of_one_tensor(recipe, tiny_checkpoint, tmp_path):
    source, path = str(tiny_checkpoint("mixtral")), recipe("{rtn: {importance: true}}")
    calibrate(CalibrateOptions(source, path, tmp_path / "m.gguf", dtype="fp32"))
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    up, gate, down, router = (f"blk.1.ffn_{n}.weight" for n in ("up_exps", "gate_exps", "down_exps", "gate_inp"))
    assert found[f"{up}.in_sum2"].shape == (4, 64) and found[f"{down}.in_sum2"].shape == (4, 128)
    np.testing.assert_array_equal(found[f"{up}.in_sum2"], found[f"{gate}.in_sum2"])
    assert found[f"{up}.counts"].shape == (4, 1)
    assert found[f"{up}.counts"].sum() == found[f"{down}.counts"].sum() == 2 * 3 * 48  # each token visits two experts
    np.testing.assert_allclose(found[f"{up}.in_sum2"].sum(0), 2 * found[f"{router}.in_sum2"], rtol=1e-4)
    sets = ("calibration.min_tokens=1",)
    quantize(QuantizeOptions(source, path, tmp_path / "walked", sets, dtype="fp32"))
    quantize(QuantizeOptions(source, path, tmp_path / "matrix", sets, imatrix=tmp_path / "m.gguf"))
    assert written(tmp_path / "matrix") == written(tmp_path / "walked")


def test_experts_that_no_token_reached(tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(str(tiny_checkpoint("mixtral")))
    measured = {}
    for expert, value in ((0, 2.0), (2, 3.0)):
        measured[f"model.layers.0.block_sparse_moe.experts.{expert}.in"] = stats = InputStats(64, frozenset({Channels}))
        stats.add(torch.full((5, 64), value))
    write_importance(tmp_path / "m.gguf", measured, checkpoint, Calibration(samples=1, length=16))
    entries = read_imatrix(tmp_path / "m.gguf").entries
    assert entries.keys() == {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"}
    entry = entries["blk.0.ffn_up_exps.weight"]
    assert entry.counts.tolist() == [5, 0, 5, 0]
    assert entry.sums.tolist() == [[20.0] * 64, [0.0] * 64, [45.0] * 64, [0.0] * 64]
    found, _ = read_importance(tmp_path / "m.gguf", checkpoint)
    assert {reads: s[Channels].importance.tolist() for reads, s in found.items()} == {
        "model.layers.0.block_sparse_moe.experts.0.in": [4.0] * 64,
        "model.layers.0.block_sparse_moe.experts.2.in": [9.0] * 64,
    }
    assert [s.tokens for s in found.values()] == [5, 5]


def test_of_another_model(measured, tiny_checkpoint, tmp_path):
    source, path, matrix = measured
    entries = read_imatrix(matrix).entries
    for name, change, expected in (
        (
            "size",
            {n: ImportanceEntry(e.sums[:, :-1].contiguous(), e.counts) for n, e in entries.items()},
            "does not fit the model",
        ),
        ("names", {"x" + n: e for n, e in entries.items()}, "is of another model: wanted token_embd.weight, found x"),
    ):
        write_imatrix(tmp_path / f"{name}.gguf", ImportanceMatrix(change, ("x",), 3, 48))
        with pytest.raises(CheckpointError, match=expected):
            quantize(QuantizeOptions(source, path, tmp_path / name, imatrix=tmp_path / f"{name}.gguf"))


def test_what_needs_more_than_it_holds(measured, tmp_path):
    source, path, matrix = measured
    options = QuantizeOptions(source, path, tmp_path / "out", ("layers.0.method=gptq",), imatrix=matrix)
    with pytest.raises(PlanError, match="gptq needs gram, which it does not hold; measure it: qtool calibrate"):
        quantize(options)
    with pytest.raises(UsageError, match="--stats and --imatrix exclude each other"):
        quantize(QuantizeOptions(source, path, tmp_path / "out", stats=matrix, imatrix=matrix))


def test_a_tied_embedding_is_rounded_without_it(recipe, tiny_checkpoint, tmp_path):
    source = str(tiny_checkpoint("llama-tied"))
    path = recipe("gptq")
    sets = ('layers.0={match: "lm_head", weights: q8_0}', 'layers.1={match: "*", weights: q4_0}')
    calibrate(CalibrateOptions(source, path, tmp_path / "m.gguf", sets))
    assert not any("output." in name and "attn" not in name for name in read_imatrix(tmp_path / "m.gguf").entries)
    report = quantize(QuantizeOptions(source, path, tmp_path / "out", sets, imatrix=tmp_path / "m.gguf"))
    assert {e.role: e.tokens for e in report.layers} == {"embedding": 0} | dict.fromkeys(
        ("q", "k", "v", "o", "gate", "up", "down"), 3 * 48
    )
    assert not any(e.fallback for e in report.layers)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["data"] == "m.gguf"


def test_a_matrix_of_zeros_is_told_of(measured, tmp_path):
    model, recipe, path = measured
    found, events = read_imatrix(path), []
    entries = {
        name: ImportanceEntry(torch.zeros_like(entry.sums), entry.counts) if "blk.1" in name else entry
        for name, entry in found.entries.items()
    }
    write_imatrix(tmp_path / "zeros.gguf", ImportanceMatrix(entries, found.datasets, 3, 48))
    options = QuantizeOptions(model, recipe, tmp_path / "out", imatrix=tmp_path / "zeros.gguf", dtype="fp32")
    quantize(options, events.append)
    wanted = f"{tmp_path / 'zeros.gguf'} says that every input of model.layers.1.self_attn.q_proj and 6 more is zero"
    assert wanted in [e.message for e in events if e.warning]
