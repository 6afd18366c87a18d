"""MXFP4 and NVFP4 as GGUF: bytes, the tensor beside NVFP4's weights, and llama.cpp's logits."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from qtool.artifact.gguf import GGUF, _writer
from qtool.checkpoint._base import Layer, Module
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint, scale_name
from qtool.errors import CheckpointError, PlanError
from qtool.evaluate.llamacpp import LlamaCpp
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.nvfp4 import NVFP4
from tests.artifact.test_gguf import TOKENS, distance, neutral, reference_logits, write
from tests.artifact.test_gguf_moe import distances, state_dict

FORMATS = [MXFP4(), MXFP4(search="ggml"), NVFP4()]


def linear(fmt):
    """Chooses the format for every linear layer but routers."""
    return lambda module: fmt if module.kind == "linear" else None


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("model_name", ["llama", "qwen3"])
def test_models_read_back_and_run(fmt, model_name, tiny_checkpoint, tmp_path: Path):
    folder = tiny_checkpoint(model_name)
    model = neutral(folder, tmp_path / "work", linear(fmt))
    path = write(model, tmp_path / "out")
    written = GGUF().open(path.parent)
    assert written.layers.keys() == model.layers.keys()
    for module in model.layers:
        found, wanted = written.matrix(module).quantized, model.matrix(module).quantized
        assert torch.equal(found.codes, wanted.codes)
        assert {n: p.tolist() for n, p in found.params.items()} == {n: p.tolist() for n, p in wanted.params.items()}
        assert torch.equal(written.rows(f"{module}.weight", 3, 9), model.rows(f"{module}.weight", 3, 9))
    tensors = {n: written.tensor(n).float() for n in written.names()}
    assert all(torch.equal(tensors[n], model.tensor(n).float()) for n in model.names())
    ours, theirs = reference_logits(folder, tensors), LlamaCpp(path, 64).logits(TOKENS)
    assert distance(theirs, ours) < 0.02  # llama.cpp rounds activations to 8 bits
    assert distance(reference_logits(folder), ours) > 0.06


def test_the_number_of_each_matrix_is_a_tensor_of_its_own(tiny_checkpoint, tmp_path: Path):
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work", linear(NVFP4()))
    stored = {t.name: t for t in gguf.GGUFReader(write(model, tmp_path / "out")).tensors}
    for module, name in (("model.layers.1.mlp.down_proj", "blk.1.ffn_down"), ("lm_head", "output")):
        scale, weight = stored[f"{name}.scale"], stored[f"{name}.weight"]
        params = model.matrix(module).quantized.params
        assert (scale.tensor_type.name, scale.shape.tolist()) == ("F32", [1])
        assert scale.data.tolist() == params["tensor"][0].tolist() and scale.data[0] != 1
        decoded = torch.from_numpy(gguf.dequantize(weight.data, weight.tensor_type)) * float(scale.data[0])
        assert torch.equal(decoded, model.tensor(f"{module}.weight"))
    assert "token_embd.scale" not in stored


@pytest.mark.parametrize("fmt", [MXFP4(), NVFP4()], ids=lambda f: f.label)
def test_experts(fmt, tiny_checkpoint, tmp_path: Path):
    folder = tiny_checkpoint("qwen3_moe")
    model = neutral(folder, tmp_path / "work", lambda m: linear(fmt)(m) if m.shape[1] % fmt.columns == 0 else None)
    assert any(name.endswith("experts.1.gate_proj") for name in model.layers)
    path = write(model, tmp_path / "out")
    written = GGUF().open(path)
    assert written.layers.keys() == model.layers.keys()
    for name in model.names():
        assert torch.equal(written.tensor(name).float(), model.tensor(name).float())
    theirs, ours = LlamaCpp(path, 64).logits(TOKENS), reference_logits(folder, state_dict(written))
    assert float(distances(theirs, ours).median()) < 0.03


def test_other_numbers_beside_a_weight(tiny_checkpoint, tmp_path: Path, monkeypatch):
    """Without a scale of its own a matrix has 1; a scale for its inputs is not the weights' business."""
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work", linear(NVFP4()))
    with monkeypatch.context() as patch:
        patch.setattr(_writer, "scale_name", lambda weight: scale_name(weight, "input_scale"))
        path = write(model, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    wanted = model.matrix(name).quantized
    assert GGUF().open(path).matrix(name).quantized.params["tensor"].unique().tolist() == [1.0]
    assert torch.equal(
        GGUFCheckpoint(path).tensor(f"{name}.weight") * wanted.params["tensor"][0].float(), wanted.decode()
    )
    path.write_bytes(path.read_bytes().replace(b"attn_q.input_scale", b"attn_q.input_scalf"))
    with pytest.raises(CheckpointError, match=r"a tensor that llama models do not have: blk\.0\.attn_q\.input_scalf"):
        GGUFCheckpoint(path)


def test_numbers_of_the_wrong_count_are_refused(tiny_checkpoint, tmp_path: Path):
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work", linear(NVFP4()))
    path = write(model, tmp_path / "out")
    data = path.read_bytes()
    name = b"blk.0.attn_q.scale"
    at = data.index(name) + len(name)
    assert data[at : at + 12] == b"\x01\0\0\0" + b"\x01" + bytes(7)  # one dimension, of one number
    offset = GGUFCheckpoint(path)._file.tensors[name.decode()].offset
    path.write_bytes(data[:offset] + b"\0\0\xc0\x7f" + data[offset + 4 :])
    with pytest.raises(CheckpointError, match=r"attn_q\.scale: wanted 1 finite numbers"):
        GGUFCheckpoint(path).tensor("model.layers.0.self_attn.q_proj.weight")


def test_what_cannot_be_carried_is_said(tiny_checkpoint, tmp_path: Path):
    def carry(fmt, k, kind="linear"):
        return GGUF().can_carry(Module("m", (), kind, "q", 0, "x", None, (64, k)), Layer(fmt), "source").reason

    assert carry(NVFP4(), 96) == "nvfp4: rows of 96 columns are not divisible by 64"
    assert carry(NVFP4(), 128) == "" and carry(MXFP4(), 96) == "" and carry(MXFP4(), 96, "embedding") == ""
    assert carry(NVFP4(), 128, "embedding") == "llama.cpp knows no matrix scale of a token embedding, as nvfp4 has one"
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work", linear(NVFP4(search="minmax")))
    with pytest.raises(PlanError, match="nvfp4-minmax: its matrix scale is no single number that is exact in 32 bits"):
        write(model, tmp_path / "out")
