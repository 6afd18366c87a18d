"""Branches of low rank in compressed-tensors: a LoRA adapter that PEFT and vLLM load, and that comes back."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.checkpoint._base import Layer, Module
from qtool.checkpoint.adapter import FOLDER
from qtool.errors import CheckpointError, NumericsError, PlanError, VerifyError
from qtool.evaluate.proof import prove
from qtool.formats.int import Int
from qtool.ops.hadamard import Hadamard
from qtool.pipeline.verify import verify
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.low_rank import LowRank
from qtool.residuals.sparse import Sparse
from tests.artifact.conftest import quantize

RANKS = {
    "model.layers.0.mlp.gate_proj": 8,
    "model.layers.0.mlp.up_proj": 8,
    "model.layers.1.mlp.down_proj": 3,
    "model.layers.1.self_attn.o_proj": 3,
}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """A model three of whose matrices have branches, of two ranks."""
    model = quantize(tiny_checkpoint("llama"), Int(bits=3, group=32))
    found = {}
    for module, rank in RANKS.items():
        residual, codes = (
            LowRank(rank=rank, whiten=False, dtype="bf16" if rank == 3 else "fp16"),
            model.matrices[module],
        )
        w = model.origin.tensor(f"{module}.weight").float()
        found[module] = Matrix(codes, (Correction(residual, residual.fit(w - codes.decode(), None)),))
        model.layers[module] = replace(model.layers[module], residuals=(residual,))
    plain = model.matrix
    model.matrix = lambda module: found.get(module) or plain(module)
    return model


@pytest.fixture
def folder(model, tmp_path):
    CompressedTensors().write(model, tmp_path, {})
    return tmp_path


def test_branches_come_back(model, folder):
    found = CompressedTensors().open(folder)
    verify("verify", found, model, lambda event: None)
    for module, rank in RANKS.items():
        (residual,) = found.layers[module].residuals
        assert (residual.rank, residual.dtype) == (rank, "bf16" if rank == 3 else "fp16")
        (correction,), (wanted,) = found.corrections(module), model.corrections(module)
        assert all(torch.equal(correction.tensors[side], tensor) for side, tensor in wanted.tensors.items())
        whole = found.tensor(f"{module}.weight")
        assert torch.equal(whole, model.matrix(module).decode())
        assert not torch.equal(whole, model.matrix(module).quantized.decode())
        torch.testing.assert_close(found.rows(f"{module}.weight", 3, 17), whole[3:17], rtol=1e-6, atol=1e-6)


def test_what_is_on_disk_is_what_peft_documents(model, folder):
    """Read with nothing of qtool: https://huggingface.co/docs/peft/developer_guides/checkpoint."""
    config = json.loads((folder / FOLDER / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bias"], config["use_rslora"], config["use_dora"]) == (
        "LORA",
        "none",
        False,
        False,
    )
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert set(config["target_modules"]) == set(RANKS)
    with safe_open(folder / FOLDER / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * len(RANKS)
        for module in RANKS:
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{side}.weight").double() for side in "AB")
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            scale = alpha / config["rank_pattern"].get(module, config["r"])
            wanted = model.matrix(module).quantized.decode().double() + scale * (b @ a)
            torch.testing.assert_close(model.matrix(module).decode().double(), wanted, rtol=0, atol=1e-6)
            assert config["lora_alpha"] / config["r"] == 1  # vLLM takes no patterns
    assert not (folder / "adapter_config.json").exists()


def test_peft_computes_with_it(model, folder):
    """Logits with the adapter are ours, and others without it."""
    pytest.importorskip("peft", reason="needs PEFT")
    artifact = CompressedTensors()
    found = prove(artifact, artifact.open(folder), model)
    assert found.reader.startswith("transformers ") and found.distance < 1e-5
    for path in (folder / FOLDER).glob("*.safetensors"):
        tensors = load_file(path)
        tensors[f"base_model.model.{UP}.lora_B.weight"] *= -1
        save_file(tensors, path, {"format": "pt", "written_by": "qtool"})
    with pytest.raises(VerifyError, match="computes something else"):
        prove(artifact, artifact.open(folder), model)


def test_without_peft_the_proof_says_so(model, folder, monkeypatch):
    readers = importlib.import_module("qtool.evaluate.readers")
    monkeypatch.setattr(readers, "find_spec", lambda name: None if name == "peft" else object())
    artifact = CompressedTensors()
    assert "PEFT" in prove(artifact, artifact.open(folder), model).why_not


def test_sizes_are_known_before(model, folder):
    artifact = CompressedTensors()
    said = artifact.footprint(model)
    assert said.total == sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    module = Module(UP, (), "linear", "up", 0, "", None, (128, 64))
    plain = artifact.nbytes(model.origin, module, replace(model.layers[UP], residuals=()))
    assert artifact.nbytes(model.origin, module, model.layers[UP]) - plain == 2 * 8 * (128 + 64)


def test_plans_say_how_it_is_loaded_and_what_it_cannot_hold(model):
    artifact, layer = CompressedTensors(), model.layers[UP]
    (said,) = [text for text in artifact.caveats(model.origin, model.layers) if "adapter" in text]
    assert said.startswith("4 matrices") and "--max-lora-rank 8 " in said
    module = Module(UP, (), "linear", "up", 0, "", None, (128, 64))
    assert artifact.can_carry(module, layer, "source").possible
    refused = {
        "no place for low_rank": (replace(module, expert=0), layer),
        "no place for sparse": (module, replace(layer, residuals=(Sparse(),))),
        "one branch": (module, replace(layer, residuals=layer.residuals * 2)),
        "a branch of low rank reads": (
            module,
            replace(layer, input_ops=(Hadamard(32, torch.ones(64, dtype=torch.int8)),)),
        ),
        "the token embedding": (replace(module, kind="embedding"), Layer(layer.format)),
    }
    for reason, (where, what) in refused.items():
        verdict = artifact.can_carry(where, what, "source")
        assert not verdict.possible and reason in verdict.reason


def tensors_changed(folder, change):
    path = folder / FOLDER / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt", "written_by": "qtool"})


def config_changed(folder, **fields):
    path = folder / FOLDER / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


A = f"base_model.model.{UP}.lora_A.weight"


def narrower(tensors):
    tensors[A] = tensors[A][:, :32].contiguous()


DAMAGES = {
    "lacks base_model": lambda folder: tensors_changed(folder, lambda t: t.pop(A)),
    "wanted float16 [8, 64], found float16 [8, 32]": lambda folder: tensors_changed(folder, narrower),
    "branches of packed matrices": lambda folder: tensors_changed(folder, lambda t: t.update({f"x.{A}": t[A].clone()})),
    "LoRA whose lora_alpha is its rank": lambda folder: config_changed(folder, lora_alpha=16),
    "no adapter's configuration": lambda folder: config_changed(folder, r=0),
    "is not valid JSON": lambda folder: (folder / FOLDER / "adapter_config.json").write_text("{"),
    "cannot be read": lambda folder: (folder / FOLDER / "adapter_config.json").unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_damaged_adapters_are_refused(said, folder):
    DAMAGES[said](folder)
    with pytest.raises(CheckpointError) as error:
        CompressedTensors().open(folder)
    assert said in str(error.value)


def test_a_branch_that_is_not_finite_is_refused_when_it_is_read(folder):
    tensors_changed(folder, lambda t: t[A].fill_(math.inf))
    with pytest.raises(NumericsError, match="lora_A"):
        CompressedTensors().open(folder).tensor(f"{UP}.weight")


def test_adapters_of_others_are_no_part_of_the_model(model, folder):
    path = folder / FOLDER / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    found = CompressedTensors().open(folder)
    assert not any(layer.residuals for layer in found.layers.values())
    assert torch.equal(found.tensor(f"{UP}.weight"), model.matrix(UP).quantized.decode())


def test_an_adapter_belongs_to_the_fingerprint(folder):
    before = CompressedTensors().open(folder).fingerprint()
    tensors_changed(folder, lambda t: t[A].mul_(2))
    assert CompressedTensors().open(folder).fingerprint() != before


@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj"])
def test_undeclared_branches_are_not_lost(module, model, tmp_path, monkeypatch):
    monkeypatch.setitem(model.layers, module, replace(model.layers[module], residuals=()))
    with pytest.raises(PlanError, match="no place for low_rank"):
        CompressedTensors().write(model, tmp_path, {})
