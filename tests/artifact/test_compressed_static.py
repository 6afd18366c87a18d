"""Inputs with one calibrated scale in compressed-tensors: literal tensors, its own code, and damage."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.qtool import Qtool
from qtool.calibrate.inputs import rounded
from qtool.checkpoint._base import Static
from qtool.errors import CheckpointError, PlanError
from qtool.recipe.schema import parse_format
from tests.artifact.conftest import quantize, save_llama
from tests.artifact.test_compressed_tensors import TOKENS, UP, change_tensors, dense, load, write

SCHEMES = {  # weights, inputs, one scale, what config.json says
    "int8": ("int8-channel", "int8-tensor", Static(0.0625), (8, "int", "tensor", True, False)),
    "int8-asym": ("int8-channel", "int8-tensor-asym", Static(0.03125, 17), (8, "int", "tensor", False, False)),
    "fp8": ("fp8-channel", "fp8-tensor", Static(0.015625), (8, "float", "tensor", True, False)),
    "fp8-tensor": ("fp8-tensor", "fp8-tensor", Static(0.0107421875), (8, "float", "tensor", True, False)),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("static"), 64, torch.float32)


def static_model(folder, scheme):
    weights, inputs, static, _ = SCHEMES[scheme]
    model = quantize(folder, parse_format(weights), parse_format(inputs).model_copy(update={"scale_dtype": "fp32"}))
    model.layers = {name: replace(layer, static=static) for name, layer in model.layers.items()}
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_what_evaluation_simulates(scheme, folder, tmp_path):
    model = static_model(folder, scheme)
    write(model, tmp_path)
    twin = dense(model, folder)
    with ExitStack() as stack, torch.no_grad():
        for name, layer in model.layers.items():
            hook = twin.get_submodule(name).register_forward_pre_hook(lambda _, x, kept=layer: rounded(x[0], kept))
            stack.callback(hook.remove)
        ours = twin(TOKENS).logits
    with torch.no_grad():
        theirs, original = load(tmp_path)(TOKENS).logits, dense(model, folder)(TOKENS).logits
    assert float((theirs - ours).norm() / (theirs - original).norm()) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_and_settings_are_those_of_the_specification(scheme, folder, tmp_path):
    _, inputs, static, told = SCHEMES[scheme]
    write(static_model(folder, scheme), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors[f"{UP}.input_scale"], torch.tensor([static.scale]))
    zero = tensors.get(f"{UP}.input_zero_point")
    assert (zero.dtype, zero.tolist()) == (torch.int8, [17]) if inputs.endswith("asym") else zero is None
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    assert tuple(group["input_activations"][key] for key in keys) == told


@pytest.mark.parametrize("artifact", [CompressedTensors, Qtool], ids=["compressed-tensors", "qtool"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_comes_back(scheme, artifact, folder, tmp_path):
    model = static_model(folder, scheme)
    artifact().write(model, tmp_path, {})
    found = artifact().open(tmp_path)
    assert found.decoded == {}
    for name, layer in model.layers.items():
        assert (found.layers[name].activations, found.layers[name].static) == (layer.activations, layer.static)
        assert torch.equal(found.tensor(f"{name}.weight"), model.tensor(f"{name}.weight"))
    write(found, tmp_path / "again")
    write(model, tmp_path / "direct")
    again, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "direct"))
    assert again.keys() == direct.keys()
    assert all(torch.equal(again[name], direct[name]) for name in direct)


DAMAGE = {
    "missing": (lambda t: t.pop(f"{UP}.input_scale"), "input_scale: wanted one number, found no such tensor"),
    "no zero": (lambda t: t.pop(f"{UP}.input_zero_point"), "input_zero_point: wanted one number"),
    "negative": (lambda t: t[f"{UP}.input_scale"].neg_(), "wanted a positive float, found -0.03125"),
    "infinite": (lambda t: t[f"{UP}.input_scale"].fill_(torch.inf), "wanted a positive float, found inf"),
    "several": (lambda t: t.update({f"{UP}.input_scale": torch.ones(2)}), "wanted one number"),
    "type": (lambda t: t.update({f"{UP}.input_zero_point": torch.ones(1)}), "wanted torch.int8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, folder, tmp_path):
    change, message = DAMAGE[damage]
    write(static_model(folder, "int8-asym"), tmp_path)
    change_tensors(change)(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path)


def test_a_scale_that_the_model_type_cannot_hold_is_refused(folder, tmp_path):
    model = static_model(folder, "int8")
    model.config = model.config | {"dtype": "bfloat16"}
    model.layers = {name: replace(layer, static=Static(0.0625001)) for name, layer in model.layers.items()}
    with pytest.raises(PlanError, match="not exact in bfloat16"):
        write(model, tmp_path)
